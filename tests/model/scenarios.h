/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of scenarios share. */
#ifndef CN_MODEL_SCENARIOS_H
#define CN_MODEL_SCENARIOS_H

#include "pool.h"

enum { A, B, C, D };           /* keys */
enum { FIRST, SECOND, THIRD }; /* clients */

/* ---- scenarios.c ---------------------------------------------------------- */

/* FIRST looks A up, checks its bytes, releases. */
void acquire(void);
/* FIRST keeps the reference of A, and opens it later: A's bytes or nothing. */
void take_token(void);
void open_token(void);
void nothing_is_left(void);

/* ---- scenarios_move.c ----------------------------------------------------- */

extern const struct scenario lease_move, token_move, both_move;
extern const struct scenario lease_clear, token_clear;

/* ---- scenarios_restart.c -------------------------------------------------- */

extern const struct scenario restart_dying_word, restart_dying_index, restart_dying_scanned;
extern const struct scenario restart_free_word, restart_grant_word, restart_commit_live;
extern const struct scenario restart_commit_index, restart_writer, restart_anywhere;

#endif
