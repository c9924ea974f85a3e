/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs a fuzz target without a fuzzer: the files named on the command line, then as many inputs
 * from a fixed seed as the last argument says (`-N`), mutated from those files. A target may say
 * how far it came, and fail when that is not far enough.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
__attribute__((weak)) void fuzz_reached(void);

enum { INPUT_BYTES_MAX = 8192, FILES_MAX = 64 };

static uint8_t corpus[FILES_MAX][INPUT_BYTES_MAX];
static size_t corpus_bytes[FILES_MAX];
static uint32_t files;
static uint64_t random_state = 88172645463325252ull;

static uint64_t random_below(uint64_t below)
{
    random_state ^= random_state << 13, random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (random_state >> 11) % below;
}

static void replay_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL || files == FILES_MAX) {
        fprintf(stderr, "%s: cannot be read, or too many files\n", path);
        exit(2);
    }
    corpus_bytes[files] = fread(corpus[files], 1, INPUT_BYTES_MAX, file);
    fclose(file);
    LLVMFuzzerTestOneInput(corpus[files], corpus_bytes[files]);
    files++;
}

static void mutate(uint64_t count)
{
    static uint8_t input[INPUT_BYTES_MAX];
    for (uint64_t n = 0; n < count; n++) {
        size_t bytes = random_below(INPUT_BYTES_MAX) + 1;
        if (files > 0 && random_below(4) != 0) {
            uint64_t from = random_below(files);
            bytes = corpus_bytes[from];
            memcpy(input, corpus[from], bytes);
        }
        uint64_t changes = 1 + random_below(32);
        for (uint64_t i = 0; i < changes && bytes > 0; i++)
            input[random_below(bytes)] = (uint8_t)random_below(256);
        LLVMFuzzerTestOneInput(input, bytes);
    }
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] == '-')
            mutate(strtoull(argv[i] + 1, NULL, 10));
        else
            replay_file(argv[i]);
    }
    if (fuzz_reached != NULL)
        fuzz_reached();
    return 0;
}
