/* SPDX-License-Identifier: Apache-2.0 */
/* Put: a chunk on its way into the pool, reserved, filled, committed or aborted. */
#include "cn_region.h"
#include "lease.h"

static const char *state_of(const Put *self)
{
    static const char *const names[] = {"open", "committing", "committed", "aborted"};
    return names[self->state];
}

int cn_put_check_open(const Put *self, const char *but)
{
    if (self->state == PUT_OPEN)
        return 0;
    PyErr_Format(PyExc_ValueError, "this put is %s: %s", state_of(self), but);
    return -1;
}

/*
 * The put is over, for everybody: said before any Python code runs, for a collector in it may call
 * this put again. Returns the extent, which is the caller's now; the view that .memory lent is
 * released. With other views on it the extent lives on until the last of them has died.
 */
static Extent *end_put(Put *self, int state)
{
    Extent *extent = self->extent;
    PyObject *memory = self->memory;
    self->state = state;
    self->extent = NULL;
    self->memory = NULL;
    if (memory != NULL) {
        PyObject *done = PyObject_CallMethod(memory, "release", NULL);
        if (done == NULL)
            PyErr_Clear(); /* a consumer of it lives: exports says so, too */
        Py_XDECREF(done);
        Py_DECREF(memory);
    }
    return extent;
}

static void put_dealloc(PyObject *object)
{
    Put *self = (Put *)object;
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    Py_CLEAR(self->memory);
    Py_CLEAR(self->extent);
    Py_XDECREF(self->key);
    Py_XDECREF(self->parent);
    Py_XDECREF((PyObject *)self->client);
    release(object);
    Py_DECREF(type);
}

static PyObject *put_abort(PyObject *object, PyObject *ignored)
{
    Put *self = (Put *)object;
    (void)ignored;
    if (self->state != PUT_OPEN)
        Py_RETURN_NONE;
    Extent *extent = end_put(self, PUT_ABORTED);
    if (extent->exports == 0)
        cn_extent_abort(extent);
    Py_DECREF((PyObject *)extent);
    Py_RETURN_NONE;
}

/* ---- committing ----------------------------------------------------------- */

/* The CRC of bytes that were written in place, where the pool wants it at commit. */
static int checksum(Put *self)
{
    Extent *extent = self->extent;
    uint32_t edit = self->edits;
    int status;
    if (self->client->checksum != CHECKSUM_AT_COMMIT || (self->record.flags & CN_RF_CRC) != 0)
        return CN_OK;
    Py_INCREF((PyObject *)extent);
    extent->exports++;
    Py_BEGIN_ALLOW_THREADS status =
        cn_guarded_crc32c(0, extent->grant.data, self->record.data_bytes, &self->record.crc32c);
    Py_END_ALLOW_THREADS extent->exports--;
    Py_DECREF((PyObject *)extent);
    if (status == CN_OK && edit == self->edits)
        self->record.flags |= CN_RF_CRC;
    return status;
}

static int submit(Put *self)
{
    struct cn_client *client = self->client->client;
    self->record.key = (const uint8_t *)PyBytes_AsString(self->key);
    if (self->parent != NULL)
        self->record.parent_key = (const uint8_t *)PyBytes_AsString(self->parent);
    int status = cn_commit(client, &self->record, 0);
    if (status != CN_ERING || self->wait_ms == 0)
        return status;
    Py_BEGIN_ALLOW_THREADS status = cn_commit(client, &self->record, self->wait_ms);
    Py_END_ALLOW_THREADS return status;
}

static PyObject *refuse_viewed(Put *self)
{
    self->state = PUT_ABORTED;
    return PyErr_Format(PyExc_BufferError,
                        "a view of this put's memory is still alive, so that its %llu bytes could "
                        "change after the commit: delete arrays and slices first. Nothing was "
                        "committed",
                        (unsigned long long)self->record.data_bytes);
}

/* Hand an extent over that nobody looks at. No view of it can be made any more, for the GIL may go
 * while the ring is full. */
static int hand_over(Put *self, Extent *extent, int status)
{
    extent->ended = true;
    if (status == CN_OK)
        status = submit(self);
    extent->ended = status == CN_OK; /* if not, it is given back as it dies */
    self->state = status == CN_OK ? PUT_COMMITTED : PUT_ABORTED;
    return status;
}

static PyObject *put_commit(PyObject *object, PyObject *ignored)
{
    Put *self = (Put *)object;
    (void)ignored;
    if (cn_put_check_open(self, "it cannot be committed any more") != 0)
        return NULL;
    if (!self->client->accepting) {
        Py_XDECREF(put_abort(object, NULL));
        return cn_raise_named(
            "PoolGone", PyUnicode_FromFormat("the daemon of pool %R is gone: nothing was committed",
                                             self->client->pool));
    }
    int status = cn_client_forked(self->client->client) ? CN_EFORKED : checksum(self);
    if (cn_put_check_open(self, "another thread ended it meanwhile") != 0)
        return NULL;
    Extent *extent = end_put(self, PUT_COMMITTING);
    bool viewed = extent->exports > 0;
    if (!viewed)
        status = hand_over(self, extent, status);
    Py_DECREF((PyObject *)extent);
    if (viewed)
        return refuse_viewed(self);
    if (status == CN_OK)
        Py_RETURN_NONE;
    return cn_raise_error(status,
                          PyUnicode_FromFormat("commit a chunk to pool %R", self->client->pool));
}

static PyObject *put_exit(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs > 0 && args[0] != Py_None)
        return put_abort(object, NULL);
    if (((Put *)object)->state == PUT_OPEN)
        return put_commit(object, NULL);
    Py_RETURN_NONE;
}

/* ---- what it knows -------------------------------------------------------- */

/* Its memory may be given away: from now on whoever has it may write at any time, so that no CRC of
 * ours holds. */
static int lend(Put *self)
{
    if (cn_put_check_open(self, "its memory is not yours any more") != 0)
        return -1;
    if (cn_client_forked(self->client->client)) {
        cn_raise_status(CN_EFORKED);
        return -1;
    }
    self->lent = true;
    self->record.flags &= ~(uint32_t)CN_RF_CRC;
    return 0;
}

static PyObject *put_memory(PyObject *object, void *ignored)
{
    Put *self = (Put *)object;
    (void)ignored;
    if (lend(self) != 0)
        return NULL;
    if (self->memory != NULL && self->extent->exports == 0)
        Py_CLEAR(self->memory); /* `with w.memory:` released it */
    if (self->memory == NULL)
        self->memory = PyMemoryView_FromObject((PyObject *)self->extent);
    return Py_XNewRef(self->memory);
}

static PyObject *put_address(PyObject *object, void *ignored)
{
    Put *self = (Put *)object;
    (void)ignored;
    return lend(self) == 0 ? PyLong_FromVoidPtr(self->extent->grant.data) : NULL;
}

static PyObject *put_state(PyObject *object, void *ignored)
{
    (void)ignored;
    return PyUnicode_FromString(state_of((Put *)object));
}

static PyObject *put_key(PyObject *object, void *ignored)
{
    (void)ignored;
    return Py_NewRef(((Put *)object)->key);
}

static PyObject *put_position(PyObject *object, void *ignored)
{
    (void)ignored;
    return PyLong_FromUnsignedLong(((Put *)object)->record.position);
}

static PyObject *put_nbytes(PyObject *object, void *ignored)
{
    (void)ignored;
    return PyLong_FromUnsignedLongLong(((Put *)object)->record.data_bytes);
}

static PyObject *put_reference(PyObject *object, void *ignored)
{
    (void)ignored;
    return PyLong_FromUnsignedLongLong(((Put *)object)->record.ref);
}

static PyObject *put_owner(PyObject *object, void *ignored)
{
    (void)ignored;
    return Py_NewRef(((Put *)object)->client->owner);
}

static PyMethodDef put_methods[] = {
    {"copy_from", CN_FAST(cn_put_copy_from), METH_FASTCALL | METH_KEYWORDS,
     "copy_from(source, offset=0) -> bytes copied. Makes the CRC in the same pass."},
    {"copy_pieces", CN_FAST(cn_put_copy_pieces), METH_FASTCALL | METH_KEYWORDS,
     "copy_pieces(addresses, lengths, offset=0) -> bytes copied. Gathers memory at addresses."},
    {"commit", put_commit, METH_NOARGS, "Hand the chunk to the keeper."},
    {"abort", put_abort, METH_NOARGS, "Give the extent back; the key stays absent."},
    {"__enter__", cn_lease_enter, METH_NOARGS, NULL},
    {"__exit__", CN_FAST(put_exit), METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef put_getset[] = {
    {"memory", put_memory, NULL, "Writable memoryview of the extent; ends with the put.", NULL},
    {"address", put_address, NULL, "Where the extent begins in this process.", NULL},
    {"state", put_state, NULL, "'open', 'committed' or 'aborted'.", NULL},
    {"key", put_key, NULL, "The key that the chunk will have.", NULL},
    {"position", put_position, NULL, "Place in its chain, 0xffffffff when unknown.", NULL},
    {"nbytes", put_nbytes, NULL, "Length of the chunk in bytes.", NULL},
    {"reference", put_reference, NULL, "Descriptor (low 32 bits) and generation.", NULL},
    {"owner", put_owner, NULL, "What keeps the mapping alive.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot put_slots[] = {
    {Py_tp_doc, "One chunk on its way into the pool."},
    {Py_tp_dealloc, put_dealloc},
    {Py_tp_methods, put_methods},
    {Py_tp_getset, put_getset},
    {0, NULL},
};

PyType_Spec cn_put_spec = {
    "cenote._native._lease.Put",
    sizeof(Put),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    put_slots,
};
