/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How much of a region is lost to the shape of the slabs, for the KV sizes of named models?
 *
 *   bench_waste [region_gib]    default 64; prints JSON, exits with 1 above 0.5 % for any model
 *
 * A chunk is 256 tokens of all layers of one rank. slab_waste is the tail of the best slab;
 * region_waste is measured: a region is filled with chunks of this one size until it is full, and
 * everything that no chunk's data covers counts, page rounding and the last, shorter slab included.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "cn_arena.h"
#include "cn_status.h"

#define CHUNK_TOKENS UINT64_C(256)
#define WASTE_PPM_MAX 5000u
#define REGION_GIB_MAX 32768u

struct model_kv {
    const char *name;
    uint64_t token_bytes; /* layers x (keys and values) x KV heads x head size x element */
};

static const struct model_kv models[] = {
    {"Llama-3-8B", 32 * 2 * 8 * 128 * 2},        {"Llama-3-70B, TP 8", 80 * 2 * 1 * 128 * 2},
    {"Llama-3-70B, TP 1", 80 * 2 * 8 * 128 * 2}, {"Qwen2.5-7B", 28 * 2 * 4 * 128 * 2},
    {"Qwen3-32B", 64 * 2 * 8 * 128 * 2},         {"DeepSeek-V3 (MLA)", 61 * 576 * 2},
    {"Llama-3.2-1B", 16 * 2 * 8 * 64 * 2},       {"Gemma-2-27B", 46 * 2 * 16 * 128 * 2},
    {"Mistral-7B, FP8", 32 * 2 * 8 * 128 * 1},
};
enum { MODELS = sizeof(models) / sizeof(models[0]) };

static void store_nowhere(void *ctx, uint32_t granule, uint64_t word)
{
    (void)ctx, (void)granule, (void)word;
}

/* Fill the region; return how many chunks it holds, 0 when there is no memory for the books. */
static uint64_t chunks_in_region(uint64_t region_bytes, uint64_t chunk_bytes)
{
    struct cn_arena *arena = NULL;
    uint64_t chunks = 0, off = 0, extent_bytes = 0;
    if (cn_arena_create(region_bytes, store_nowhere, NULL, &arena) != CN_OK)
        return 0;
    while (cn_arena_alloc(arena, chunk_bytes, &off, &extent_bytes) == CN_OK)
        chunks++;
    cn_arena_destroy(arena);
    return chunks;
}

static bool model_report(const struct model_kv *model, uint64_t region_bytes, bool last)
{
    const uint64_t chunk_bytes = model->token_bytes * CHUNK_TOKENS;
    uint32_t slab_ppm = 0;
    const uint32_t granules = cn_arena_slab_granules(chunk_bytes, &slab_ppm);
    const uint64_t chunks = chunks_in_region(region_bytes, chunk_bytes);
    const double region_waste = 1 - (double)(chunks * chunk_bytes) / (double)region_bytes;

    printf("    {\"model\": \"%s\", \"chunk_bytes\": %" PRIu64 ", \"slab_mib\": %u, "
           "\"chunks_per_slab\": %" PRIu64 ", \"slab_waste\": %.6f, \"region_waste\": %.6f}%s\n",
           model->name, chunk_bytes, granules * 2,
           (uint64_t)granules * CN_GRANULE_BYTES / chunk_bytes, slab_ppm * 1e-6, region_waste,
           last ? "" : ",");
    return chunks > 0 && slab_ppm <= WASTE_PPM_MAX;
}

int main(int argc, char **argv)
{
    const unsigned long region_gib = argc > 1 ? strtoul(argv[1], NULL, 10) : 64;
    bool passed = true;
    if (region_gib == 0 || region_gib > REGION_GIB_MAX) {
        fprintf(stderr, "bench_waste: region of %s GiB: give a number from 1 to %u\n", argv[1],
                REGION_GIB_MAX);
        return 2;
    }
    printf("{\n  \"bench\": \"waste\", \"chunk_tokens\": %" PRIu64 ", \"region_gib\": %lu,\n",
           CHUNK_TOKENS, region_gib);
    printf("  \"rows\": [\n");
    for (int i = 0; i < MODELS; i++)
        passed = model_report(&models[i], (uint64_t)region_gib << 30, i == MODELS - 1) && passed;
    printf("  ],\n  \"bar\": \"slab_waste <= %.3f\", \"passed\": %s\n}\n", WASTE_PPM_MAX * 1e-6,
           passed ? "true" : "false");
    return passed ? 0 : 1;
}
