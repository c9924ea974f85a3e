/* SPDX-License-Identifier: Apache-2.0 */
/* Errors are defined once, in cenote._native.errors. */
#include "lease.h"

static PyObject *errors_attribute(const char *name)
{
    PyObject *errors = PyImport_ImportModule("cenote._native.errors");
    if (errors == NULL)
        return NULL;
    PyObject *found = PyObject_GetAttrString(errors, name);
    Py_DECREF(errors);
    return found;
}

PyObject *cn_raise_named(const char *name, PyObject *message)
{
    PyObject *type = message == NULL ? NULL : errors_attribute(name);
    if (type != NULL)
        PyErr_SetObject(type, message);
    Py_XDECREF(type);
    Py_XDECREF(message);
    return NULL;
}

static PyObject *raise_named(const char *name, const char *message)
{
    return cn_raise_named(name, PyUnicode_FromString(message));
}

PyObject *cn_raise_error(int status, PyObject *what)
{
    PyObject *error_of = what == NULL ? NULL : errors_attribute("error_of");
    PyObject *error = NULL;
    if (error_of != NULL)
        error = PyObject_CallFunction(error_of, "iO", status, what);
    if (error != NULL)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    Py_XDECREF(error_of);
    Py_XDECREF(what);
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
