/* SPDX-License-Identifier: Apache-2.0 */
/* Span: memory at an address, for as long as its owner lives. */
#include "lease.h"

static int span_getbuffer(PyObject *object, Py_buffer *buffer, int flags)
{
    Span *self = (Span *)object;
    return PyBuffer_FillInfo(buffer, object, self->data, self->bytes, 0, flags);
}

static void span_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    Py_XDECREF(((Span *)object)->owner);
    release(object);
    Py_DECREF(type);
}

static PyObject *span_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    unsigned long long address;
    Py_ssize_t bytes;
    PyObject *owner;
    if (kwargs != NULL && PyDict_Size(kwargs) > 0)
        return PyErr_Format(PyExc_TypeError, "Span() takes no keyword arguments");
    if (!PyArg_ParseTuple(args, "KnO", &address, &bytes, &owner))
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Span *self = (Span *)alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->owner = Py_NewRef(owner);
    self->data = (void *)(uintptr_t)address;
    self->bytes = bytes;
    return (PyObject *)self;
}

static PyType_Slot span_slots[] = {
    {Py_tp_doc, "Span(address, nbytes, owner): memory that owner holds, as a writable buffer."},
    {Py_tp_new, span_new},
    {Py_tp_dealloc, span_dealloc},
    {Py_bf_getbuffer, span_getbuffer},
    {0, NULL},
};

PyType_Spec cn_span_spec = {
    "cenote._native._lease.Span", sizeof(Span), 0, Py_TPFLAGS_DEFAULT, span_slots,
};
