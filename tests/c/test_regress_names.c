/* SPDX-License-Identifier: Apache-2.0 */
/* Claim: once a namespace was opened by a name, that name with another manifest is refused, also
 * when the namespace has another name already; and a session that ended gives nothing to its
 * successor. */
#include "pool_bed.h"

static int open_ns(struct bed *bed, uint8_t id, const char *name, uint32_t session)
{
    static const uint8_t manifest[] = {0x80};
    struct cn_namespace_open ns = {.id = {id},
                                   .tenant = id == 9 ? 9 : 0,
                                   .name = name,
                                   .manifest = manifest,
                                   .manifest_bytes = 1,
                                   .session = session};
    return cn_keeper_namespace_open(bed->keeper, &ns);
}

int main(int argc, char **argv)
{
    struct bed bed = bed_open(8 << 20, 64, 512, "lru");
    if (argc < 2 || argv[1][0] == '1') {
        CHECK_EQ(open_ns(&bed, 1, "test", UINT32_MAX), CN_OK);
        int second = open_ns(&bed, 1, "prod", UINT32_MAX); /* bind it, or refuse: not neither */
        int other = open_ns(&bed, 2, "prod", UINT32_MAX);
        CHECK(second != CN_OK || other == CN_EINVAL);
    } else {
        struct bed_session a = bed_attach(&bed, CN_ROLE_WRITER);
        uint32_t idx = a.session;
        bed_kill(&bed, &a);
        struct bed_session b = bed_attach(&bed, CN_ROLE_WRITER);
        CHECK_EQ(b.session, idx);
        /* asked for by a's connection, which is still open */
        CHECK_EQ(open_ns(&bed, 9, "", idx), CN_OK);
        CHECK_EQ(bed.keeper->sessions[idx]->tenant, 0); /* as b's own bed_attach() made it */
        bed_kill(&bed, &b);
    }
    bed_close(&bed);
    return 0;
}
