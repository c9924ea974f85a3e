/* SPDX-License-Identifier: Apache-2.0 */
/* Extent: reserved memory. It outlives its put for as long as somebody looks at it (I2). */
#include "lease.h"

static int extent_getbuffer(PyObject *object, Py_buffer *buffer, int flags)
{
    Extent *self = (Extent *)object;
    if (self->ended) {
        buffer->obj = NULL;
        PyErr_SetString(PyExc_ValueError, "the put is over: its memory is not yours any more");
        return -1;
    }
    int failed = PyBuffer_FillInfo(buffer, object, self->grant.data, self->data_bytes, 0, flags);
    if (failed == 0)
        self->exports++;
    return failed;
}

static void extent_releasebuffer(PyObject *object, Py_buffer *buffer)
{
    (void)buffer;
    ((Extent *)object)->exports--;
}

/* Nobody writes to it any more. In a forked child the core does nothing (I13). */
void cn_extent_abort(Extent *self)
{
    if (self->ended)
        return;
    self->ended = true;
    cn_abort(self->client->client, self->grant.ref);
}

static void extent_dealloc(PyObject *object)
{
    Extent *self = (Extent *)object;
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    cn_extent_abort(self);
    Py_XDECREF((PyObject *)self->client);
    release(object);
    Py_DECREF(type);
}

static PyType_Slot extent_slots[] = {
    {Py_tp_doc, "Reserved memory of the pool; given back when it dies, unless it was committed."},
    {Py_tp_dealloc, extent_dealloc},
    {Py_bf_getbuffer, extent_getbuffer},
    {Py_bf_releasebuffer, extent_releasebuffer},
    {0, NULL},
};

PyType_Spec cn_extent_spec = {
    "cenote._native._lease.Extent",
    sizeof(Extent),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    extent_slots,
};
