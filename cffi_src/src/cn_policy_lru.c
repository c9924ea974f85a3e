/* SPDX-License-Identifier: Apache-2.0 */
/* Least recently used: one list; a chain lies in it root first, so that it is cut from its tail. */
#include "cn_policy_impl.h"

static uint32_t only_list(uint8_t uses)
{
    (void)uses;
    return 0;
}

static void lru_insert(struct cn_policy *p, uint32_t d, uint32_t parent, uint64_t hash,
                       uint32_t now_s)
{
    (void)hash;
    p->nodes[d].uses = 0;
    cn_policy_heal(p, parent, 0, now_s, only_list);
    cn_policy_place(p, 0, d, parent, CN_POLICY_REQUEST_S, now_s);
}

static void lru_touch(struct cn_policy *p, const uint32_t *d, const uint64_t *hash, uint32_t count,
                      uint32_t now_s)
{
    uint32_t above = count != 0 ? p->parent_of(p->parent_ctx, d[0]) : CN_NONE;

    (void)hash;
    cn_policy_heal(p, above, 0, now_s, only_list);
    for (uint32_t i = count; i-- > 0;) {
        if (cn_policy_listed(p, d[i]))
            cn_policy_place(p, 0, d[i], above, CN_POLICY_REQUEST_S, now_s);
    }
}

static uint32_t lru_victim(struct cn_policy *p, uint32_t now_s)
{
    (void)now_s;
    return p->lists[0].tail;
}

/* Leased means in use now, the most recent use there is. One list: rotation visits all. */
static void lru_skip(struct cn_policy *p, uint32_t d, uint32_t now_s)
{
    if (cn_policy_listed(p, d))
        cn_policy_push(p, 0, d, now_s);
}

static void lru_remove(struct cn_policy *p, uint32_t d, uint64_t hash, bool evicted)
{
    (void)hash;
    (void)evicted;
    cn_policy_unlink(p, d);
}

const struct cn_policy_ops cn_policy_lru_ops = {
    .name = "lru",
    .insert = lru_insert,
    .touch = lru_touch,
    .victim = lru_victim,
    .skip = lru_skip,
    .remove = lru_remove,
};
