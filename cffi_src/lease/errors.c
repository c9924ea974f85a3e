/* SPDX-License-Identifier: Apache-2.0 */
/* Errors are defined once, in cenote._native.errors. */
#include "lease.h"

static PyObject *raise_named(const char *name, const char *message)
{
    PyObject *errors = PyImport_ImportModule("cenote._native.errors");
    if (errors == NULL)
        return NULL;
    PyObject *type = PyObject_GetAttrString(errors, name);
    Py_DECREF(errors);
    if (type == NULL)
        return NULL;
    PyErr_SetString(type, message);
    Py_DECREF(type);
    return NULL;
}

PyObject *cn_raise_status(int status)
{
    switch (status) {
    case CN_EFORKED:
        return raise_named("ForkedChild", "this pool handle belongs to the parent process; "
                                          "call connect() in the child");
    case CN_ECLOSED:
        return raise_named("PoolGone", "the pool handle is closed; call connect() again");
    case CN_ECORRUPT:
        return raise_named("Corrupt", "the pool's shared memory holds nonsense; the chunk is not "
                                      "served. Run `cenote status` and restart the daemon");
    case CN_ELOST:
        return raise_named("ChunkLost", "the memory under the chunk is gone; compute it again");
    case CN_ELIMIT:
        return PyErr_Format(PyExc_ValueError, "more than %d keys in one call",
                            CN_KEYS_PER_CALL_MAX);
    default:
        return PyErr_Format(PyExc_RuntimeError, "%s", cn_status_text(status));
    }
}
