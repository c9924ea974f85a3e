/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which schedules: depth-first, every one executed from the start.
 *
 * Two steps are dependent if they belong to one agent or touch the same word and one writes it, so
 * that schedules that differ only in the order of independent steps are equivalent, and one of each
 * class is enough: source sets (Abdulla, Aronis, Jonsson, Sagonas, "Optimal dynamic partial order
 * reduction", POPL 2014), with vector clocks for "happens before", and sleep sets. A store buffer
 * is an agent of its own, as in Abdulla et al., "Stateless model checking for TSO and PSO" (2015).
 * There is no bound on preemptions; what is bounded is the depth of a buffer and the crashes.
 */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "explorer.h"

struct node { /* before step n + 1 */
    struct op next[AGENTS];
    uint32_t has; /* agents that have a next op, able to move or not */
    uint32_t enabled;
    uint32_t backtrack; /* to be tried here */
    uint32_t done;
    uint32_t sleep;
    int chosen;
};

struct step {
    struct op op;
    uint32_t agent;
    uint64_t value;
    uint16_t clock[AGENTS]; /* last step of each agent that happens before, from 1 */
};

static struct node nodes[STEPS_MAX + 1];
static struct step steps[STEPS_MAX + 1];
static uint32_t step_count;
static uint32_t prefix;          /* nodes from the run before that still stand */
static uint32_t last_of[AGENTS]; /* number of an agent's last step, 0: none */
static const uint32_t *replay;
static uint32_t replay_count;

static bool every_order; /* no reduction: for the self-check */
static uint64_t outcomes[4096];
static uint32_t outcome_count;

void model_outcome(uint64_t outcome)
{
    for (uint32_t i = 0; i < outcome_count; i++)
        if (outcomes[i] == outcome)
            return;
    if (outcome_count == sizeof(outcomes) / sizeof(outcomes[0]))
        model_violation("more outcomes than there is room for");
    outcomes[outcome_count++] = outcome;
}

uint32_t search_step(void) { return step_count; }

void search_value(uint64_t value) { steps[step_count - 1].value = value; }

static bool is_kill(uint32_t agent) { return agent_kind(agent) == AGENT_KILL; }

static bool dependent(uint32_t a, const struct op *x, uint32_t b, const struct op *y)
{
    if (a == b || (is_kill(a) && is_kill(b)))
        return true;
    if (agent_task(a) == agent_task(b)) {
        /* A buffer is first in, first out; what must wait for it is not able to move before. */
        if (!is_kill(a) && !is_kill(b))
            return false;
        const struct op *other = is_kill(a) ? y : x;
        /* Killed before or after a step that nobody else can notice: no difference. */
        return other->kind != OP_LOAD && other->kind != OP_FENCE && other->kind != OP_START &&
               other->kind != OP_FLUSH;
    }
    return x->cell != NULL && x->cell == y->cell && (x->writes || y->writes);
}

static void join(uint16_t *clock, const uint16_t *other)
{
    for (uint32_t i = 0; i < AGENTS; i++)
        if (other[i] > clock[i])
            clock[i] = other[i];
}

/* Does step i (from 0) happen before what has this clock? */
static bool before(uint32_t i, const uint16_t *clock) { return clock[steps[i].agent] >= i + 1; }

/* What happens before the next step of agent by program order and by what lets it move. */
static void base_clock(uint32_t agent, const struct op *op, uint16_t *ret_clock)
{
    uint32_t task = agent_task(agent);
    memset(ret_clock, 0, AGENTS * sizeof(*ret_clock));
    if (last_of[agent] != 0)
        join(ret_clock, steps[last_of[agent] - 1].clock);
    uint32_t flushed = last_of[agent_of(AGENT_FLUSH, task)];
    uint32_t cause = 0;
    if (agent_kind(agent) == AGENT_FLUSH)
        cause = machine_oldest_store(task);
    else if (op->kind == OP_WOKEN || op->kind == OP_POLL)
        cause = machine_woken_by(task);
    if (cause != 0)
        join(ret_clock, steps[cause - 1].clock);
    /* What waited until its buffer was empty, or (a store) had room. */
    bool waits = agent_kind(agent) == AGENT_RUN && op->kind != OP_LOAD && op->kind != OP_START;
    if (waits && flushed != 0)
        join(ret_clock, steps[flushed - 1].clock);
}

/* Of the steps after step i that do not depend on it, and the newest: who could have gone first? */
static uint32_t initials(uint32_t i)
{
    uint32_t members[STEPS_MAX];
    uint32_t count = 0;
    uint32_t seen = 0;
    uint32_t first = 0;
    for (uint32_t j = i + 1; j < step_count; j++) {
        if (before(i, steps[j].clock) && j + 1 != step_count)
            continue;
        bool free = (seen >> steps[j].agent & 1) == 0;
        for (uint32_t m = 0; free && m < count; m++)
            free = !before(members[m], steps[j].clock);
        seen |= 1u << steps[j].agent;
        first |= (uint32_t)free << steps[j].agent;
        members[count++] = j;
    }
    return first;
}

/* The step just taken and step i could have come the other way round: make sure that this is
 * tried. */
static void reverse(uint32_t i)
{
    struct node *pre = &nodes[i];
    uint32_t first = initials(i) & pre->enabled;
    if (first == 0)
        pre->backtrack |= pre->enabled;
    else if ((first & pre->backtrack) == 0)
        pre->backtrack |= first & -first;
}

/* Stay with the task that moved last, then other tasks, then buffers; kills last. */
static uint32_t preferred(uint32_t candidates)
{
    if (step_count > 0) {
        uint32_t agent = agent_of(AGENT_RUN, agent_task(steps[step_count - 1].agent));
        if ((candidates >> agent & 1) != 0)
            return agent;
    }
    return (uint32_t)__builtin_ctz(candidates);
}

static uint32_t inherited_sleep(uint32_t n)
{
    if (n == 0)
        return 0;
    const struct node *before = &nodes[n - 1];
    const struct step *step = &steps[n - 1];
    uint32_t asleep = (before->sleep | before->done) & before->has & ~(1u << step->agent);
    for (uint32_t agent = 0; agent < AGENTS; agent++)
        if ((asleep >> agent & 1) != 0 &&
            dependent(agent, &before->next[agent], step->agent, &step->op))
            asleep &= ~(1u << agent);
    return asleep;
}

static void make_node(uint32_t n)
{
    struct node *node = &nodes[n];
    node->has = node->backtrack = node->done = 0;
    node->chosen = CHOICE_END;
    node->enabled = machine_enabled();
    for (uint32_t agent = 0; agent < AGENTS; agent++)
        node->has |= (uint32_t)machine_next(agent, &node->next[agent]) << agent;
    node->sleep = every_order ? 0 : inherited_sleep(n);
}

#define KILLS (((1u << TASKS_MAX) - 1) << (2 * TASKS_MAX))

/* At a node that no run has been at. */
static int first_choice(uint32_t n)
{
    make_node(n);
    struct node *node = &nodes[n];
    uint32_t awake = node->enabled & ~node->sleep;
    if ((node->enabled & ~KILLS) == 0) {
        node->backtrack =
            awake; /* all is over; or somebody is killed, now or (by a race) earlier */
        return CHOICE_END;
    }
    if (awake == 0)
        return CHOICE_PRUNE;
    node->chosen = (int)preferred(awake);
    node->backtrack = every_order ? awake : 1u << node->chosen;
    return node->chosen;
}

static void take_step(uint32_t agent, const struct op *op)
{
    struct step *s = &steps[step_count];
    uint32_t races[AGENTS * 8];
    uint32_t race_count = 0;
    s->op = *op;
    s->agent = agent;
    s->value = 0;
    base_clock(agent, op, s->clock);
    for (uint32_t i = step_count; i-- > 0;) {
        if (before(i, s->clock) || !dependent(agent, op, steps[i].agent, &steps[i].op))
            continue;
        join(s->clock, steps[i].clock);
        if (race_count < sizeof(races) / sizeof(races[0]))
            races[race_count++] = i;
    }
    step_count++;
    s->clock[agent] = (uint16_t)step_count;
    last_of[agent] = step_count;
    if (replay == NULL && step_count >= prefix)
        for (uint32_t i = 0; i < race_count; i++)
            reverse(races[i]);
}

static int replayed_choice(uint32_t n)
{
    if (n >= replay_count)
        return (machine_enabled() & ~KILLS) == 0 ? CHOICE_END : CHOICE_TOO_LONG;
    if (replay[n] >= AGENTS || (machine_enabled() >> replay[n] & 1) == 0)
        model_violation("step %u of the replay, agent %u, is not possible", n + 1, replay[n]);
    return (int)replay[n];
}

int search_choose(void)
{
    uint32_t n = step_count;
    int agent;
    if (n == STEPS_MAX)
        return CHOICE_TOO_LONG;
    if (replay != NULL)
        agent = replayed_choice(n);
    else
        agent = n < prefix ? nodes[n].chosen : first_choice(n);
    if (agent < 0)
        return agent;
    struct op op;
    machine_next((uint32_t)agent, &op);
    take_step((uint32_t)agent, &op);
    return agent;
}

/* The deepest node with something left to try becomes the end of the prefix. */
static bool next_schedule(uint32_t node_count)
{
    for (uint32_t n = node_count; n-- > 0;) {
        struct node *node = &nodes[n];
        if (node->chosen >= 0)
            node->done |= 1u << node->chosen;
        uint32_t left = node->backtrack & ~node->done & ~node->sleep;
        if (left == 0)
            continue;
        node->chosen = __builtin_ctz(left);
        prefix = n + 1;
        return true;
    }
    return false;
}

static enum outcome run_once(void)
{
    step_count = 0;
    memset(last_of, 0, sizeof(last_of));
    return machine_run();
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Until every schedule was run, one was bad, or (words > 0) that many words are known as shared. */
static void explore(double seconds_max, uint32_t words, struct search_result *r)
{
    double start = now_s();
    *r = (struct search_result){0};
    prefix = outcome_count = 0;
    replay = NULL;
    while (words == 0 || machine_shared_words() < words) {
        r->outcome = run_once();
        if (r->outcome == RUN_GREW) {
            prefix = outcome_count = 0;
            r->schedules = r->pruned = 0;
            continue;
        }
        r->schedules += r->outcome != RUN_PRUNED;
        r->pruned += r->outcome == RUN_PRUNED;
        if (r->outcome == RUN_VIOLATED || r->outcome == RUN_TOO_LONG)
            break;
        uint32_t node_count = step_count + 1; /* the last one has no step behind it */
        if (!next_schedule(node_count)) {
            r->outcome = RUN_ENDED;
            break;
        }
        r->stopped = seconds_max > 0 && (r->schedules + r->pruned) % 1024 == 0 &&
                     now_s() - start > seconds_max;
        if (r->stopped)
            break;
    }
    r->seconds = now_s() - start;
    r->outcomes = outcome_count;
}

void search_every_order(const struct scenario *s, const struct machine_options *o,
                        struct search_result *ret_result)
{
    machine_open(s, o);
    every_order = true;
    explore(0, 0, ret_result);
    every_order = false;
}

void search_all(const struct scenario *s, const struct machine_options *o, double seconds_max,
                struct search_result *ret_result)
{
    machine_open(s, o);
    explore(seconds_max, 0, ret_result);
}

enum outcome search_replay(const struct scenario *s, const struct machine_options *o,
                           const uint32_t *list, uint32_t count)
{
    struct search_result found;
    machine_open(s, o);
    explore(0, list[0], &found); /* the same words must be steps as were when it was written down */
    if (machine_shared_words() != list[0])
        return RUN_TOO_LONG;
    replay = list + 1;
    replay_count = count - 1;
    enum outcome outcome = run_once();
    replay = NULL;
    return outcome;
}

uint32_t search_schedule(uint32_t *ret_list, uint32_t list_max)
{
    uint32_t count = 0;
    ret_list[count++] = machine_shared_words();
    for (uint32_t i = 0; i < step_count && count < list_max; i++)
        ret_list[count++] = steps[i].agent;
    return count;
}

static const char *const op_names[] = {
    [OP_START] = "starts",   [OP_LOAD] = "loads",
    [OP_STORE] = "stores",   [OP_CAS] = "compares and swaps",
    [OP_ADD] = "adds to",    [OP_FENCE] = "fence",
    [OP_WAIT] = "waits on",  [OP_WOKEN] = "wakes up",
    [OP_WAKE] = "wakes",     [OP_BELL] = "rings",
    [OP_POLL] = "hears",     [OP_FLUSH] = "store is seen:",
    [OP_KILL] = "IS KILLED",
};

void search_print_trace(const struct scenario *s)
{
    for (uint32_t i = 0; i < step_count; i++) {
        char name[128] = "";
        const struct step *step = &steps[i];
        if (step->op.addr != NULL && step->op.kind != OP_KILL)
            machine_name(step->op.addr, name, sizeof(name));
        printf("%5u  %-10s %-18s %-24s", i + 1, s->task_name[agent_task(step->agent)],
               op_names[step->op.kind], name);
        if (step->op.kind == OP_LOAD || step->op.kind == OP_STORE || step->op.kind == OP_CAS ||
            step->op.kind == OP_ADD || step->op.kind == OP_FLUSH)
            printf(" 0x%llx", (unsigned long long)step->value);
        putchar('\n');
    }
}
