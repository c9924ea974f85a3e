/* SPDX-License-Identifier: Apache-2.0 */
/* Claim: after a change of policy eviction takes each chunk once; bytes stay those of their
 * keys. */
#include "pool_bed.h"

int main(void)
{
    alarm(20);
    struct bed bed = bed_open(8 << 20, 4096, 512, "lru");
    struct bed_session s = bed_attach(&bed, CN_ROLE_WRITER);
    uint64_t n = 0;
    for (; n < 1; n++)
        CHECK_EQ(bed_put(&bed, s.client, n, 4096, NULL), CN_OK);
    bed_settle(&bed);
    struct cn_keeper_config config = bed_config("use-count");
    CHECK_EQ(cn_keeper_configure(bed.keeper, &config), CN_OK);
    for (; n < 6000; n++) {
        int status = bed_put(&bed, s.client, n, 4096, NULL);
        CHECK_EQ(status, CN_OK);
        bed_settle(&bed);
        struct cn_view view;
        struct bed_key key = bed_key(n);
        if (cn_lease(s.client, bed.ns, key.bytes, &view) == CN_OK) {
            bed_check_bytes(&view, n);
            cn_release(s.client, view.slot);
        }
    }
    bed_audit(&bed);
    bed_kill(&bed, &s);
    bed_close(&bed);
    return 0;
}
