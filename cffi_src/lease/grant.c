/* SPDX-License-Identifier: Apache-2.0 */
/* Grant: reserved bytes, writable until commit. */
#include "lease.h"

static int grant_getbuffer(PyObject *object, Py_buffer *buffer, int flags)
{
    Grant *self = (Grant *)object;
    if (self->closed) {
        buffer->obj = NULL;
        PyErr_SetString(PyExc_ValueError,
                        "the chunk was committed or aborted; its memory has ended");
        return -1;
    }
    int failed = PyBuffer_FillInfo(buffer, object, self->data, self->bytes, 0, flags);
    if (failed == 0)
        self->exports++;
    return failed;
}

static void grant_releasebuffer(PyObject *object, Py_buffer *buffer)
{
    (void)buffer;
    ((Grant *)object)->exports--;
}

static void grant_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    Py_XDECREF(((Grant *)object)->owner);
    release(object);
    Py_DECREF(type);
}

static PyObject *grant_close(PyObject *object, PyObject *ignored)
{
    Grant *self = (Grant *)object;
    (void)ignored;
    if (self->exports > 0)
        return PyErr_Format(
            PyExc_BufferError,
            "%zd view(s) of the chunk's memory are alive; delete them before commit",
            self->exports);
    self->closed = 1;
    Py_RETURN_NONE;
}

static PyObject *grant_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    unsigned long long address;
    Py_ssize_t bytes;
    PyObject *owner;
    if (kwargs != NULL && PyDict_Size(kwargs) > 0)
        return PyErr_Format(PyExc_TypeError, "Grant() takes no keyword arguments");
    if (!PyArg_ParseTuple(args, "KnO", &address, &bytes, &owner))
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Grant *self = (Grant *)alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->owner = Py_NewRef(owner);
    self->data = (void *)(uintptr_t)address;
    self->bytes = bytes;
    return (PyObject *)self;
}

static PyMethodDef grant_methods[] = {
    {"close", grant_close, METH_NOARGS, "No more views. BufferError while one is alive."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef grant_getset[] = {
    {"memory", cn_lease_memory, NULL, "Writable memoryview of the reserved bytes.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot grant_slots[] = {
    {Py_tp_doc, "Grant(address, nbytes, owner): reserved pool memory, writable until close()."},
    {Py_tp_new, grant_new},
    {Py_tp_dealloc, grant_dealloc},
    {Py_bf_getbuffer, grant_getbuffer},
    {Py_bf_releasebuffer, grant_releasebuffer},
    {Py_tp_methods, grant_methods},
    {Py_tp_getset, grant_getset},
    {0, NULL},
};

PyType_Spec cn_grant_spec = {
    "cenote._native._lease.Grant", sizeof(Grant), 0, Py_TPFLAGS_DEFAULT, grant_slots,
};
