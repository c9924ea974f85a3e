/* SPDX-License-Identifier: Apache-2.0 */
/*
 * explore --list
 * explore [--nightly] [--seconds N]               all scenarios (of two tasks, or of three too)
 * explore SCENARIO [--sc] [--buffer N] [--crashes N] [--seconds N]
 * explore SCENARIO --expect-violation                a planted defect: it must be found, and replay
 * explore SCENARIO --replay 12,0,0,1,...             one schedule, as a violation printed it
 *
 * Exit status: 0 as expected, 1 not, 2 usage.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "explorer.h"

struct arguments {
    const char *scenario;
    const char *replay;
    int buffer;
    int crashes;
    double seconds;
    bool sc;
    bool nightly;
    bool expect_violation;
};

static uint32_t list[STEPS_MAX + 1];

static struct machine_options options_for(const struct scenario *s, const struct arguments *a)
{
    struct machine_options o = {.buffer = s->buffer == 0 ? MODEL_BUFFER : s->buffer,
                                .crashes = s->crashes};
    if (a->buffer > 0)
        o.buffer = (uint32_t)a->buffer;
    if (a->crashes >= 0)
        o.crashes = (uint32_t)a->crashes;
    if (a->sc)
        o.buffer = 0;
    return o;
}

static void print_schedule(const struct scenario *s)
{
    uint32_t count = search_schedule(list, STEPS_MAX + 1);
    printf("    replay: explore %s --replay ", s->name);
    for (uint32_t i = 0; i < count; i++)
        printf("%s%u", i == 0 ? "" : ",", list[i]);
    putchar('\n');
}

static void print_line(const struct scenario *s, const struct machine_options *o,
                       const struct search_result *r, const char *verdict)
{
    printf("%-20s %s %9llu schedules %9llu pruned %7.2f s  %s\n", s->name,
           o->buffer == 0 ? "SC " : "TSO", (unsigned long long)r->schedules,
           (unsigned long long)r->pruned, r->seconds, verdict);
    fflush(stdout);
}

/* True if it went as it should. */
static bool explore_one(const struct scenario *s, const struct arguments *a)
{
    struct machine_options o = options_for(s, a);
    struct search_result r;
    char verdict[640];
    search_all(s, &o, a->seconds, &r);
    bool bad = r.outcome == RUN_VIOLATED || r.outcome == RUN_TOO_LONG;
    uint32_t expected = o.buffer == 0 ? s->outcomes_sc : s->outcomes_tso;
    if (!bad && expected != 0) {
        snprintf(verdict, sizeof(verdict), "%u outcomes of %u", r.outcomes, expected);
        print_line(s, &o, &r, verdict);
        return r.outcomes == expected;
    }
    if (!bad) {
        print_line(s, &o, &r, r.stopped ? "no violation so far" : "no violation");
        return !a->expect_violation;
    }
    snprintf(verdict, sizeof(verdict), "%s: %s", a->expect_violation ? "found" : "VIOLATION",
             r.outcome == RUN_TOO_LONG ? "a schedule without end" : machine_message());
    print_line(s, &o, &r, verdict);
    uint32_t count = search_schedule(list, STEPS_MAX + 1);
    if (!a->expect_violation) {
        print_schedule(s);
        search_print_trace(s);
        return false;
    }
    bool again = search_replay(s, &o, list, count) == r.outcome;
    if (!again)
        printf("    but its schedule does not replay\n");
    return again;
}

static bool replay(const struct scenario *s, const struct arguments *a)
{
    struct machine_options o = options_for(s, a);
    uint32_t count = 0;
    char *text = strdup(a->replay);
    char *rest = NULL;
    for (char *word = strtok_r(text, ",", &rest); word != NULL && count <= STEPS_MAX;
         word = strtok_r(NULL, ",", &rest))
        list[count++] = (uint32_t)strtoul(word, NULL, 10);
    enum outcome outcome = count == 0 ? RUN_TOO_LONG : search_replay(s, &o, list, count);
    search_print_trace(s);
    printf("%s: %s\n", s->name,
           outcome == RUN_VIOLATED ? machine_message()
           : outcome == RUN_ENDED  ? "no violation"
                                   : "this list is not from this build of this scenario");
    return outcome == RUN_ENDED;
}

static bool self_check(const struct arguments *a)
{
    bool good = true;
    for (const struct scenario *const *s = model_litmus; *s != NULL; s++) {
        struct arguments sc = *a;
        sc.sc = true;
        good = explore_one(*s, &sc) && explore_one(*s, a) && good;
    }
    return good;
}

#define RANDOM_PROGRAMS 200u

static bool random_check(void)
{
    struct search_result reduced, every;
    uint64_t reduced_schedules = 0, every_schedules = 0;
    for (uint32_t seed = 1; seed <= RANDOM_PROGRAMS; seed++) {
        const struct scenario *s = model_random_program(seed);
        struct machine_options o = {.buffer = seed % 5 == 0 ? 0 : 2, .crashes = s->crashes};
        search_all(s, &o, 0, &reduced);
        search_every_order(s, &o, &every);
        reduced_schedules += reduced.schedules + reduced.pruned;
        every_schedules += every.schedules;
        if (reduced.outcomes == every.outcomes)
            continue;
        printf("random program %u: %u outcomes, %u without reduction\n", seed, reduced.outcomes,
               every.outcomes);
        return false;
    }
    printf("%u random programs: the same outcomes from %llu schedules as from all %llu\n",
           RANDOM_PROGRAMS, (unsigned long long)reduced_schedules,
           (unsigned long long)every_schedules);
    return true;
}

static bool all(const struct arguments *a)
{
    bool good = self_check(a) && random_check();
    for (const struct scenario *const *s = model_scenarios; *s != NULL; s++)
        if (a->nightly || !(*s)->nightly)
            good = explore_one(*s, a) && good;
    return good;
}

static const struct scenario *find(const char *name)
{
    for (const struct scenario *const *s = model_litmus; *s != NULL; s++)
        if (strcmp((*s)->name, name) == 0)
            return *s;
    for (const struct scenario *const *s = model_scenarios; *s != NULL; s++)
        if (strcmp((*s)->name, name) == 0)
            return *s;
    return NULL;
}

static int usage(const char *why)
{
    fprintf(stderr, "explore: %s; `explore --list` names the scenarios\n", why);
    return 2;
}

static bool parse(int argc, char **argv, struct arguments *a)
{
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--sc") == 0)
            a->sc = true;
        else if (strcmp(argv[i], "--nightly") == 0)
            a->nightly = true;
        else if (strcmp(argv[i], "--expect-violation") == 0)
            a->expect_violation = true;
        else if (strcmp(argv[i], "--replay") == 0 && value != NULL)
            a->replay = argv[++i];
        else if (strcmp(argv[i], "--buffer") == 0 && value != NULL)
            a->buffer = atoi(argv[++i]);
        else if (strcmp(argv[i], "--crashes") == 0 && value != NULL)
            a->crashes = atoi(argv[++i]);
        else if (strcmp(argv[i], "--seconds") == 0 && value != NULL)
            a->seconds = atof(argv[++i]);
        else if (argv[i][0] != '-' && a->scenario == NULL)
            a->scenario = argv[i];
        else
            return false;
    }
    return a->buffer <= 16;
}

int main(int argc, char **argv)
{
    struct arguments a = {.crashes = -1};
    if (argc == 2 && strcmp(argv[1], "--list") == 0) {
        for (const struct scenario *const *s = model_scenarios; *s != NULL; s++)
            printf("%-20s %s%s\n", (*s)->name, (*s)->claim, (*s)->nightly ? " (nightly)" : "");
        return 0;
    }
    if (!parse(argc, argv, &a))
        return usage("unknown argument, or a value is missing");
    if (a.scenario == NULL)
        return all(&a) ? 0 : 1;
    const struct scenario *s = find(a.scenario);
    if (s == NULL)
        return usage("no such scenario");
    return (a.replay != NULL ? replay(s, &a) : explore_one(s, &a)) ? 0 : 1;
}
