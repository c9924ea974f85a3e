/* SPDX-License-Identifier: Apache-2.0 */
/* Lease: one leased chunk, a read-only buffer in the pool. */
#include <errno.h>

#include "cn_region.h"
#include "lease.h"

static void lease_end(Lease *self)
{
    struct cn_client *client = self->client;
    if (client == NULL)
        return;
    self->client = NULL;
    cn_release(client, self->view.slot);
}

static int lease_getbuffer(PyObject *object, Py_buffer *buffer, int flags)
{
    Lease *self = (Lease *)object;
    if (self->dropped || self->client == NULL) {
        buffer->obj = NULL;
        PyErr_SetString(PyExc_ValueError, "the chunk was released");
        return -1;
    }
    int failed =
        PyBuffer_FillInfo(buffer, object, self->view.data, (Py_ssize_t)self->view.bytes, 1, flags);
    if (failed == 0)
        self->exports++;
    return failed;
}

static void lease_releasebuffer(PyObject *object, Py_buffer *buffer)
{
    Lease *self = (Lease *)object;
    (void)buffer;
    self->exports--;
    if (self->exports == 0 && self->dropped)
        lease_end(self);
}

static void lease_dealloc(PyObject *object)
{
    Lease *self = (Lease *)object;
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    lease_end(self);
    Py_XDECREF(self->owner);
    release(object);
    Py_DECREF(type);
}

static PyObject *lease_release(PyObject *object, PyObject *ignored)
{
    Lease *self = (Lease *)object;
    (void)ignored;
    self->dropped = 1;
    if (self->exports == 0)
        lease_end(self);
    Py_RETURN_NONE;
}

PyObject *cn_lease_enter(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    return Py_NewRef(object);
}

static PyObject *lease_exit(PyObject *object, PyObject *args)
{
    return lease_release(object, args);
}

PyObject *cn_lease_memory(PyObject *object, void *ignored)
{
    (void)ignored;
    return PyMemoryView_FromObject(object);
}

static PyObject *lease_nbytes(PyObject *object, void *ignored)
{
    (void)ignored;
    return PyLong_FromUnsignedLongLong(((Lease *)object)->view.bytes);
}

static PyObject *lease_ref(PyObject *object, void *ignored)
{
    (void)ignored;
    return PyLong_FromUnsignedLongLong(((Lease *)object)->view.ref);
}

static PyObject *lease_address(PyObject *object, void *ignored)
{
    (void)ignored;
    return PyLong_FromVoidPtr(((Lease *)object)->view.data);
}

static PyObject *lease_flags(PyObject *object, void *ignored)
{
    (void)ignored;
    return PyLong_FromUnsignedLong(((Lease *)object)->view.flags);
}

static PyObject *lease_owner(PyObject *object, void *ignored)
{
    (void)ignored;
    return Py_NewRef(((Lease *)object)->owner);
}

static PyObject *lease_meta(PyObject *object, void *ignored)
{
    Lease *self = (Lease *)object;
    const void *meta;
    uint32_t bytes;
    (void)ignored;
    if (self->client == NULL) {
        PyErr_SetString(PyExc_ValueError, "the chunk was released");
        return NULL;
    }
    if (cn_client_forked(self->client))
        return cn_raise_status(CN_EFORKED);
    int status = cn_view_meta(self->client, &self->view, &meta, &bytes);
    if (status != CN_OK)
        return cn_raise_status(status);
    return PyBytes_FromStringAndSize(meta, bytes);
}

/* None: there is none, or there is none yet. */
static PyObject *lease_crc32c(PyObject *object, void *ignored)
{
    Lease *self = (Lease *)object;
    uint32_t crc;
    (void)ignored;
    if (self->client == NULL) {
        PyErr_SetString(PyExc_ValueError, "the chunk was released");
        return NULL;
    }
    if (cn_client_forked(self->client))
        return cn_raise_status(CN_EFORKED);
    if (cn_view_crc32c(self->client, &self->view, &crc) == CN_OK)
        return PyLong_FromUnsignedLong(crc);
    Py_RETURN_NONE;
}

static Py_ssize_t lease_length(PyObject *object)
{
    return (Py_ssize_t)((Lease *)object)->view.bytes;
}

/* True: the bytes match their checksum; False: they do not; None: there is none. */
static PyObject *lease_verify(PyObject *object, PyObject *ignored)
{
    Lease *self = (Lease *)object;
    int status;
    (void)ignored;
    if (self->client == NULL) {
        PyErr_SetString(PyExc_ValueError, "the chunk was released");
        return NULL;
    }
    if (cn_client_forked(self->client))
        return cn_raise_status(CN_EFORKED);
    self->exports++; /* the bytes stay while the GIL is away */
    Py_BEGIN_ALLOW_THREADS status = cn_view_verify(self->client, &self->view);
    Py_END_ALLOW_THREADS lease_releasebuffer(object, NULL);
    if (status == CN_EMISS)
        Py_RETURN_NONE;
    return PyBool_FromLong(status == CN_OK);
}

/* Copy with the lease held; long copies let other threads run. */
static int copy_into(Lease *self, void *to)
{
    int status;
    if (self->view.bytes < CN_KEEP_GIL_BELOW_BYTES)
        return cn_guarded_copy_out(to, self->view.data, self->view.bytes);
    self->exports++; /* the bytes stay while the GIL is away */
    Py_BEGIN_ALLOW_THREADS status = cn_guarded_copy_out(to, self->view.data, self->view.bytes);
    Py_END_ALLOW_THREADS lease_releasebuffer((PyObject *)self, NULL);
    return status;
}

/* copy_to(target): plain buffers here; what has none (tensors, bfloat16 arrays) in Python. */
static PyObject *lease_copy_to(PyObject *object, PyObject *target)
{
    Lease *self = (Lease *)object;
    Py_buffer buffer;
    if (PyObject_GetBuffer(target, &buffer, PyBUF_WRITABLE) != 0) {
        PyErr_Clear();
        return PyObject_CallMethod(object, "_copy_to_other", "O", target);
    }
    int status = CN_OK;
    PyObject *failed = Py_None;
    if (self->client == NULL || self->dropped)
        failed = PyErr_Format(PyExc_ValueError, "the chunk was released");
    else if ((uint64_t)buffer.len != self->view.bytes)
        failed = PyErr_Format(PyExc_ValueError, "the target has %zd bytes, and the chunk has %llu",
                              buffer.len, (unsigned long long)self->view.bytes);
    else if (cn_client_forked(self->client))
        failed = cn_raise_status(CN_EFORKED);
    else
        status = copy_into(self, buffer.buf);
    PyBuffer_Release(&buffer);
    if (failed == NULL)
        return NULL;
    if (status != CN_OK)
        return cn_raise_status(status);
    Py_RETURN_NONE;
}

/* Turn SIGBUS under copy_to() into ChunkLost, once for the process. */
PyObject *cn_lease_install_guard(PyObject *module, PyObject *ignored)
{
    struct cn_syserr error;
    (void)module;
    (void)ignored;
    if (cn_guard_install(&error) == CN_OK)
        Py_RETURN_NONE;
    errno = error.err;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyMethodDef lease_methods[] = {
    {"copy_to", lease_copy_to, METH_O,
     "Copy the bytes into writable, contiguous memory of exactly that length."},
    {"release", lease_release, METH_NOARGS,
     "Drop the chunk's own reference; the lease ends when the last view dies."},
    {"verify", lease_verify, METH_NOARGS,
     "Compare the bytes with the recorded CRC-32C: True, False, or None when none is recorded."},
    {"__enter__", cn_lease_enter, METH_NOARGS, NULL},
    {"__exit__", lease_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef lease_getset[] = {
    {"memory", cn_lease_memory, NULL, "Read-only memoryview of the chunk's bytes, in the pool.",
     NULL},
    {"nbytes", lease_nbytes, NULL, "Length in bytes.", NULL},
    {"ref", lease_ref, NULL, "Descriptor (low 32 bits) and generation.", NULL},
    {"address", lease_address, NULL, "Address of the first byte in this process.", NULL},
    {"flags", lease_flags, NULL, "Flags of the chunk when it was leased.", NULL},
    {"meta", lease_meta, NULL, "The writer's opaque metadata, b'' if there is none.", NULL},
    {"crc32c", lease_crc32c, NULL, "The recorded CRC-32C of the bytes, None if there is none.",
     NULL},
    {"owner", lease_owner, NULL, "What keeps the mapping alive.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot lease_slots[] = {
    {Py_tp_doc, "One leased chunk: a read-only buffer in the pool."},
    {Py_tp_dealloc, lease_dealloc},
    {Py_bf_getbuffer, lease_getbuffer},
    {Py_bf_releasebuffer, lease_releasebuffer},
    {Py_sq_length, lease_length},
    {Py_tp_methods, lease_methods},
    {Py_tp_getset, lease_getset},
    {0, NULL},
};

PyType_Spec cn_lease_spec = {
    "cenote._native._lease.Lease",
    sizeof(Lease),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    lease_slots,
};
