/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Crash points: one after each step of a catalog change. tests/crash kills a keeper at every one of
 * them, has another take over, and looks for contradictions. Nothing outside of such a build.
 */
#ifndef CN_CRASH_H
#define CN_CRASH_H

#ifdef CN_CRASH_POINTS
extern void (*cn_crash_hook)(const char *point);
#define CN_CRASH_POINT(name)                                                                       \
    do {                                                                                           \
        if (cn_crash_hook)                                                                         \
            cn_crash_hook(#name);                                                                  \
    } while (0)
#else
#define CN_CRASH_POINT(name) ((void)0)
#endif

#endif
