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

#endif
