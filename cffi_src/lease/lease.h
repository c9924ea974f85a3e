/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The hit path as Python sees it: cenote._native._lease.
 *
 * A Python class cannot export a buffer before 3.12, and a view that outlives its lease is a wrong
 * byte. So the object that holds a lease is a small C type with the buffer protocol: slices, arrays
 * and tensors made from it keep it alive, and the last one to die clears the slot (I3). Calls keep
 * the GIL: they are shorter than giving it up. Destructors wait for nobody: they run in any
 * thread, inside other calls, at shutdown and in forked children, where they do nothing (I13).
 * Only the end of a put takes a lock, the ring's, which is held for a record's length.
 */
#ifndef CN_LEASE_H
#define CN_LEASE_H

#include <Python.h>
#include <stdbool.h>

#include "cn_api.h"

typedef struct {
    PyObject_HEAD struct cn_client *client; /* NULL: the lease has ended */
    PyObject *owner;                        /* keeps the mapping */
    struct cn_view view;
    Py_ssize_t exports; /* living buffers */
    char dropped;       /* release() was called: ends with the last buffer */
} Lease;

typedef struct {
    PyObject_HEAD struct cn_client *client;
    PyObject *owner;
    struct cn_view *views;
    Py_ssize_t count;
} Batch;

/* enum of struct Client.checksum: when a chunk gets its CRC-32C ([pool] checksum) */
enum { CHECKSUM_OFF = 0, CHECKSUM_LAZY = 1, CHECKSUM_AT_COMMIT = 2 };

typedef struct {
    PyObject_HEAD struct cn_client *client;
    PyObject *owner;
    PyObject *pool; /* its name, for messages */
    PyTypeObject *chunk_type;
    allocfunc chunk_alloc;
    PyTypeObject *put_type;
    allocfunc put_alloc;
    PyTypeObject *batch_type;
    PyTypeObject *extent_type;
    allocfunc extent_alloc;
    int checksum;
    bool accepting; /* a writer's session whose daemon is there: puts are taken */
} Client;

/* Reserved memory of the pool. An extent that somebody may still write to never goes back (I2): it
 * is aborted when it dies, and views keep it alive. */
typedef struct {
    PyObject_HEAD Client *client;
    struct cn_grant grant;
    Py_ssize_t data_bytes;
    Py_ssize_t exports; /* living buffers */
    bool ended;         /* committed or given back */
} Extent;

/* Only an open put has an extent. */
enum { PUT_OPEN, PUT_COMMITTING, PUT_COMMITTED, PUT_ABORTED };

typedef struct {
    PyObject_HEAD Extent *extent; /* NULL: the put is over */
    PyObject *memory;             /* the view that .memory lends, or NULL */
    PyObject *key;                /* bytes */
    PyObject *parent;             /* bytes or NULL */
    Client *client;
    struct cn_put record;
    uint32_t wait_ms;
    uint32_t edits;      /* copies begun: a CRC holds if none began since */
    uint32_t summed_crc; /* of the first summed bytes, which copies filled one behind the other */
    Py_ssize_t summed;
    int state;
    bool lent; /* .memory was: whoever has it may write at any time, so no CRC of ours holds */
} Put;

/* Memory that somebody else holds, as a buffer that claims to be writable. */
typedef struct {
    PyObject_HEAD PyObject *owner;
    void *data;
    Py_ssize_t bytes;
} Span;

/* Giving the GIL up for less costs more than the copy. */
#define CN_KEEP_GIL_BELOW_BYTES 0x40000u
#define CN_FAST(function) ((PyCFunction)(void (*)(void))(function))

extern PyType_Spec cn_lease_spec;
extern PyType_Spec cn_batch_spec;
extern PyType_Spec cn_extent_spec;
extern PyType_Spec cn_put_spec;
extern PyType_Spec cn_span_spec;
extern PyType_Spec cn_client_spec;

/* 0, or -1 with a ValueError that says in which state the put is, and what cannot be done. */
int cn_put_check_open(const Put *self, const char *but);
/* Methods of Put: what fills it. */
PyObject *cn_put_copy_from(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                           PyObject *names);
PyObject *cn_put_copy_pieces(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *names);

/* Nobody writes to it any more: it goes back now, not when it dies. */
void cn_extent_abort(Extent *self);

/* Client.put(slot, key, nbytes, parent, position, ttl_s, priority, meta, wait_ms) */
PyObject *cn_client_put(PyObject *object, PyObject *const *args, Py_ssize_t nargs);
/* Reads a namespace slot from args[0] when there are as many arguments as wanted; -1 with an
 * exception set otherwise. */
int cn_slot_of(PyObject *const *args, Py_ssize_t given, Py_ssize_t wanted, const char *name,
               uint32_t *ret_slot);

/* Set the exception of cenote._native.errors that belongs to status; returns NULL. */
PyObject *cn_raise_status(int status);
/* The same with what was being done, to which object; takes the reference to what. Returns NULL. */
PyObject *cn_raise_error(int status, PyObject *what);
/* Raise the class of cenote._native.errors that has this name; takes message. Returns NULL. */
PyObject *cn_raise_named(const char *name, PyObject *message);
/* `__enter__` and `.memory` of every type here: itself, and a memoryview of itself. */
PyObject *cn_lease_enter(PyObject *object, PyObject *ignored);
PyObject *cn_lease_memory(PyObject *object, void *ignored);

/* Module function: install the SIGBUS guard of this module's copies. */
PyObject *cn_lease_install_guard(PyObject *module, PyObject *ignored);

#endif
