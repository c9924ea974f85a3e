/* SPDX-License-Identifier: Apache-2.0 */
/* Batch: leases of consecutive chunks, as arrays for adapters. */
#include <string.h>

#include "lease.h"

static void batch_end(Batch *self)
{
    if (self->client != NULL)
        cn_release_many(self->client, self->views, (uint32_t)self->count);
    self->client = NULL;
}

static void batch_dealloc(PyObject *object)
{
    Batch *self = (Batch *)object;
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    batch_end(self);
    PyMem_Free(self->views);
    Py_XDECREF(self->owner);
    release(object);
    Py_DECREF(type);
}

static PyObject *batch_release(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    batch_end((Batch *)object);
    Py_RETURN_NONE;
}

static Py_ssize_t batch_length(PyObject *object) { return ((Batch *)object)->count; }

enum batch_field { BATCH_ADDRESSES, BATCH_LENGTHS, BATCH_REFS };

static uint64_t batch_value(const struct cn_view *view, enum batch_field field)
{
    return field == BATCH_ADDRESSES ? (uint64_t)(uintptr_t)view->data
           : field == BATCH_LENGTHS ? view->bytes
                                    : view->ref;
}

static PyObject *batch_column(Batch *self, enum batch_field field)
{
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, self->count * 8);
    if (bytes == NULL)
        return NULL;
    char *to = PyBytes_AsString(bytes);
    for (Py_ssize_t i = 0; i < self->count; i++) {
        uint64_t value = batch_value(&self->views[i], field);
        memcpy(to + i * 8, &value, 8);
    }
    PyObject *view = PyMemoryView_FromObject(bytes);
    Py_DECREF(bytes);
    if (view == NULL)
        return NULL;
    PyObject *cast = PyObject_CallMethod(view, "cast", "s", "Q");
    Py_DECREF(view);
    return cast;
}

static PyObject *batch_addresses(PyObject *object, void *ignored)
{
    (void)ignored;
    return batch_column((Batch *)object, BATCH_ADDRESSES);
}

static PyObject *batch_lengths(PyObject *object, void *ignored)
{
    (void)ignored;
    return batch_column((Batch *)object, BATCH_LENGTHS);
}

static PyObject *batch_refs(PyObject *object, void *ignored)
{
    (void)ignored;
    return batch_column((Batch *)object, BATCH_REFS);
}

static PyMethodDef batch_methods[] = {
    {"release", batch_release, METH_NOARGS, "End all leases; the addresses are dead from here on."},
    {"__enter__", cn_lease_enter, METH_NOARGS, NULL},
    {"__exit__", batch_release, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef batch_getset[] = {
    {"addresses", batch_addresses, NULL, "Address of each chunk: memoryview of format 'Q'.", NULL},
    {"lengths", batch_lengths, NULL, "Bytes of each chunk: memoryview of format 'Q'.", NULL},
    {"refs", batch_refs, NULL, "Reference of each chunk: memoryview of format 'Q'.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot batch_slots[] = {
    {Py_tp_doc, "Leases of consecutive chunks, for adapters: arrays of addresses and lengths."},
    {Py_tp_dealloc, batch_dealloc},
    {Py_sq_length, batch_length},
    {Py_tp_methods, batch_methods},
    {Py_tp_getset, batch_getset},
    {0, NULL},
};

PyType_Spec cn_batch_spec = {
    "cenote._native._lease.Batch",
    sizeof(Batch),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    batch_slots,
};
