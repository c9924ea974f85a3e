/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The hit path as Python sees it: cenote._native._lease.
 *
 * A Python class cannot export a buffer before 3.12, and a view that outlives its lease is a wrong
 * byte. So the object that holds a lease is a small C type with the buffer protocol: slices, arrays
 * and tensors made from it keep it alive, and the last one to die clears the slot (I3). Calls keep
 * the GIL: they are shorter than giving it up. Destructors take no lock: they run in any thread,
 * inside other calls, at shutdown and in forked children, where they do nothing (I13).
 */
#ifndef CN_LEASE_H
#define CN_LEASE_H

#include <Python.h>

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

typedef struct {
    PyObject_HEAD PyObject *owner;
    void *data;
    Py_ssize_t bytes;
    Py_ssize_t exports;
    char closed;
} Grant;

typedef struct {
    PyObject_HEAD struct cn_client *client;
    PyObject *owner;
    PyTypeObject *chunk_type;
    allocfunc chunk_alloc;
    PyTypeObject *batch_type;
} Client;

extern PyType_Spec cn_lease_spec;
extern PyType_Spec cn_batch_spec;
extern PyType_Spec cn_grant_spec;
extern PyType_Spec cn_client_spec;

/* Set the exception of cenote._native.errors that belongs to status; returns NULL. */
PyObject *cn_raise_status(int status);
/* `__enter__` and `.memory` of every type here: itself, and a memoryview of itself. */
PyObject *cn_lease_enter(PyObject *object, PyObject *ignored);
PyObject *cn_lease_memory(PyObject *object, void *ignored);

/* Module function: install the SIGBUS guard of this module's copies. */
PyObject *cn_lease_install_guard(PyObject *module, PyObject *ignored);

#endif
