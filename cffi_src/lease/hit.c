/* SPDX-License-Identifier: Apache-2.0 */
/* Client: the calls of the hit path. */
#include <string.h>

#include "lease.h"

#define KEYS_ON_STACK 64

/* Keys of one call: a borrowed buffer of 32*n bytes, or a copy gathered from a sequence. */
struct keys {
    const uint8_t *bytes;
    Py_ssize_t count;
    Py_buffer buffer;
    uint8_t *gathered;
    uint8_t on_stack[KEYS_ON_STACK * CN_KEY_BYTES];
};

static int copy_key(PyObject *key, Py_ssize_t i, uint8_t *to)
{
    Py_buffer one;
    if (PyObject_GetBuffer(key, &one, PyBUF_SIMPLE) != 0)
        return -1;
    Py_ssize_t bytes = one.len;
    if (bytes == CN_KEY_BYTES)
        memcpy(to, one.buf, CN_KEY_BYTES);
    PyBuffer_Release(&one);
    if (bytes == CN_KEY_BYTES)
        return 0;
    PyErr_Format(PyExc_ValueError, "key %zd has %zd bytes; a key has exactly 32", i, bytes);
    return -1;
}

static int gather(PyObject *sequence, struct keys *keys)
{
    Py_ssize_t count = PySequence_Size(sequence);
    if (count < 0)
        return -1;
    if (count > CN_KEYS_PER_CALL_MAX) {
        cn_raise_status(CN_ELIMIT);
        return -1;
    }
    uint8_t *to = keys->on_stack;
    if (count > KEYS_ON_STACK)
        to = keys->gathered = PyMem_Malloc((size_t)count * CN_KEY_BYTES);
    if (to == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *key = PySequence_GetItem(sequence, i);
        int failed = key == NULL ? -1 : copy_key(key, i, to + i * CN_KEY_BYTES);
        Py_XDECREF(key);
        if (failed != 0)
            return -1;
    }
    keys->bytes = to;
    keys->count = count;
    return 0;
}

static void keys_close(struct keys *keys)
{
    if (keys->buffer.obj != NULL)
        PyBuffer_Release(&keys->buffer);
    PyMem_Free(keys->gathered);
}

static int keys_open(PyObject *object, struct keys *keys)
{
    keys->buffer.obj = NULL;
    keys->gathered = NULL;
    if (!PyObject_CheckBuffer(object)) {
        if (gather(object, keys) == 0)
            return 0;
        keys_close(keys);
        return -1;
    }
    if (PyObject_GetBuffer(object, &keys->buffer, PyBUF_SIMPLE) != 0)
        return -1;
    keys->bytes = keys->buffer.buf;
    keys->count = keys->buffer.len / CN_KEY_BYTES;
    if (keys->buffer.len % CN_KEY_BYTES == 0 && keys->count <= CN_KEYS_PER_CALL_MAX)
        return 0;
    if (keys->buffer.len % CN_KEY_BYTES != 0)
        PyErr_Format(PyExc_ValueError, "%zd bytes of keys are not a multiple of 32",
                     keys->buffer.len);
    else
        cn_raise_status(CN_ELIMIT);
    keys_close(keys);
    return -1;
}

/* One key: bytes mostly, so look at those without the buffer protocol. */
static const uint8_t *one_key(PyObject *object, uint8_t *storage)
{
    if (PyBytes_CheckExact(object)) {
        if (PyBytes_Size(object) == CN_KEY_BYTES)
            return (const uint8_t *)PyBytes_AsString(object);
        PyErr_Format(PyExc_ValueError, "the key has %zd bytes; a key has exactly 32",
                     PyBytes_Size(object));
        return NULL;
    }
    return copy_key(object, 0, storage) == 0 ? storage : NULL;
}

int cn_slot_of(PyObject *const *args, Py_ssize_t given, Py_ssize_t wanted, const char *name,
               uint32_t *ret_slot)
{
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, %zd given", name, wanted, given);
        return -1;
    }
    unsigned long slot = PyLong_AsUnsignedLong(args[0]);
    if (slot == (unsigned long)-1 && PyErr_Occurred())
        return -1;
    *ret_slot = (uint32_t)slot;
    return 0;
}

static PyObject *wrap(Client *self, const struct cn_view *view)
{
    Lease *lease = (Lease *)self->chunk_alloc(self->chunk_type, 0);
    if (lease == NULL) {
        cn_release(self->client, view->slot);
        return NULL;
    }
    lease->client = self->client;
    lease->owner = Py_NewRef(self->owner);
    lease->view = *view;
    return (PyObject *)lease;
}

/* After a dirty start a chunk is checked before its first use (I9). */
static int admit(Client *self, const struct cn_view *view)
{
    int status;
    Py_BEGIN_ALLOW_THREADS status = cn_view_admit(self->client, view);
    Py_END_ALLOW_THREADS return status;
}

static PyObject *wrap_status(Client *self, int status, const struct cn_view *view)
{
    if (status == CN_OK && (view->flags & CN_CF_UNVERIFIED) != 0)
        status = admit(self, view);
    if (status == CN_OK)
        return wrap(self, view);
    if (status == CN_EMISS || status == CN_ELEASES)
        Py_RETURN_NONE;
    return cn_raise_status(status);
}

static PyObject *client_get(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Client *self = (Client *)object;
    uint32_t slot;
    uint8_t storage[CN_KEY_BYTES];
    struct cn_view view;
    if (cn_slot_of(args, nargs, 2, "get", &slot) != 0)
        return NULL;
    const uint8_t *key = one_key(args[1], storage);
    if (key == NULL)
        return NULL;
    return wrap_status(self, cn_lease(self->client, slot, key, &view), &view);
}

static PyObject *client_open(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Client *self = (Client *)object;
    struct cn_view view;
    if (nargs != 2)
        return PyErr_Format(PyExc_TypeError, "open() takes 2 arguments, %zd given", nargs);
    unsigned long long ref = PyLong_AsUnsignedLongLong(args[0]);
    unsigned long long head = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    return wrap_status(self, cn_lease_ref(self->client, ref, head, &view), &view);
}

static PyObject *client_match(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Client *self = (Client *)object;
    uint32_t slot;
    uint32_t count;
    struct keys keys;
    if (cn_slot_of(args, nargs, 2, "match", &slot) != 0 || keys_open(args[1], &keys) != 0)
        return NULL;
    int status = cn_match(self->client, slot, keys.bytes, (uint32_t)keys.count, &count);
    keys_close(&keys);
    return status == CN_OK ? PyLong_FromUnsignedLong(count) : cn_raise_status(status);
}

/* How many of the views, from the first on, may be used; the leases of the others are released. */
static uint32_t admit_prefix(Client *self, const struct cn_view *views, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        if ((views[i].flags & CN_CF_UNVERIFIED) == 0 || admit(self, &views[i]) == CN_OK)
            continue;
        cn_release_many(self->client, views + i + 1, count - i - 1);
        return i;
    }
    return count;
}

/* The longest present prefix, leased; views are the caller's to free. NULL with an exception
 * set. */
static struct cn_view *lease_prefix(Client *self, uint32_t slot, PyObject *object,
                                    uint32_t *ret_count)
{
    struct keys keys;
    if (keys_open(object, &keys) != 0)
        return NULL;
    struct cn_view *views = PyMem_Malloc(sizeof(*views) * (size_t)(keys.count + 1));
    int status = CN_ENOMEM;
    if (views != NULL)
        status =
            cn_lease_many(self->client, slot, keys.bytes, (uint32_t)keys.count, views, ret_count);
    keys_close(&keys);
    if (status == CN_OK) {
        *ret_count = admit_prefix(self, views, *ret_count);
        return views;
    }
    PyMem_Free(views);
    if (status == CN_ENOMEM)
        PyErr_NoMemory();
    else
        cn_raise_status(status);
    return NULL;
}

static PyObject *client_get_many(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Client *self = (Client *)object;
    uint32_t slot;
    uint32_t count;
    if (cn_slot_of(args, nargs, 2, "get_many", &slot) != 0)
        return NULL;
    struct cn_view *views = lease_prefix(self, slot, args[1], &count);
    if (views == NULL)
        return NULL;
    PyObject *list = PyList_New(count);
    uint32_t wrapped = 0;
    while (list != NULL && wrapped < count) {
        PyObject *lease = wrap(self, &views[wrapped]); /* on failure it has released that one */
        wrapped++;
        if (lease == NULL)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, (Py_ssize_t)wrapped - 1, lease);
    }
    if (list == NULL)
        cn_release_many(self->client, views + wrapped, count - wrapped);
    PyMem_Free(views);
    return list;
}

static PyObject *client_lease_many(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Client *self = (Client *)object;
    uint32_t slot;
    uint32_t count;
    if (cn_slot_of(args, nargs, 2, "lease_many", &slot) != 0)
        return NULL;
    struct cn_view *views = lease_prefix(self, slot, args[1], &count);
    if (views == NULL)
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(self->batch_type, Py_tp_alloc);
    Batch *batch = (Batch *)alloc(self->batch_type, 0);
    if (batch == NULL) {
        cn_release_many(self->client, views, count);
        PyMem_Free(views);
        return NULL;
    }
    batch->client = self->client;
    batch->owner = Py_NewRef(self->owner);
    batch->views = views;
    batch->count = count;
    return (PyObject *)batch;
}

/* A type of this module, by name. */
static PyTypeObject *own_type(PyObject *module, const char *name)
{
    return (PyTypeObject *)PyObject_GetAttrString(module, name);
}

static int check_subclass(PyObject *type, PyTypeObject *base, const char *what)
{
    if (base == NULL)
        return -1;
    int is = PyObject_IsSubclass(type, (PyObject *)base);
    if (is == 0)
        PyErr_Format(PyExc_TypeError, "%s must be a subclass of %R", what, base);
    return is == 1 ? 0 : -1;
}

static int client_types(Client *self, PyObject *chunk_type, PyObject *put_type)
{
    PyObject *module = PyImport_ImportModule("cenote._native._lease");
    if (module == NULL)
        return -1;
    PyTypeObject *lease = own_type(module, "Lease");
    PyTypeObject *put = own_type(module, "Put");
    self->batch_type = own_type(module, "Batch");
    self->extent_type = own_type(module, "Extent");
    Py_DECREF(module);
    int failed = self->batch_type == NULL || self->extent_type == NULL ||
                 check_subclass(chunk_type, lease, "chunk_type") != 0 ||
                 check_subclass(put_type, put, "put_type") != 0;
    Py_XDECREF((PyObject *)lease);
    Py_XDECREF((PyObject *)put);
    if (failed)
        return -1;
    self->chunk_type = (PyTypeObject *)Py_NewRef(chunk_type);
    self->chunk_alloc = (allocfunc)PyType_GetSlot(self->chunk_type, Py_tp_alloc);
    self->put_type = (PyTypeObject *)Py_NewRef(put_type);
    self->put_alloc = (allocfunc)PyType_GetSlot(self->put_type, Py_tp_alloc);
    self->extent_alloc = (allocfunc)PyType_GetSlot(self->extent_type, Py_tp_alloc);
    return 0;
}

static PyObject *client_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    unsigned long long address;
    PyObject *owner;
    PyObject *chunk_type;
    PyObject *put_type;
    PyObject *pool;
    int checksum;
    if (kwargs != NULL && PyDict_Size(kwargs) > 0)
        return PyErr_Format(PyExc_TypeError, "Client() takes no keyword arguments");
    if (!PyArg_ParseTuple(args, "KOOOUi", &address, &owner, &chunk_type, &put_type, &pool,
                          &checksum))
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Client *self = (Client *)alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->client = (struct cn_client *)(uintptr_t)address;
    self->owner = Py_NewRef(owner);
    self->pool = Py_NewRef(pool);
    self->checksum = checksum;
    if (client_types(self, chunk_type, put_type) == 0)
        return (PyObject *)self;
    Py_DECREF((PyObject *)self);
    return NULL;
}

static void client_dealloc(PyObject *object)
{
    Client *self = (Client *)object;
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    Py_XDECREF(self->owner);
    Py_XDECREF(self->pool);
    Py_XDECREF((PyObject *)self->chunk_type);
    Py_XDECREF((PyObject *)self->put_type);
    Py_XDECREF((PyObject *)self->batch_type);
    Py_XDECREF((PyObject *)self->extent_type);
    release(object);
    Py_DECREF(type);
}

static PyObject *client_get_accepting(PyObject *object, void *ignored)
{
    (void)ignored;
    return PyBool_FromLong(((Client *)object)->accepting);
}

static int client_set_accepting(PyObject *object, PyObject *value, void *ignored)
{
    (void)ignored;
    int accepting = value == NULL ? 0 : PyObject_IsTrue(value);
    if (accepting < 0)
        return -1;
    ((Client *)object)->accepting = accepting != 0;
    return 0;
}

static PyMethodDef client_methods[] = {
    {"get", CN_FAST(client_get), METH_FASTCALL, "get(slot, key) -> chunk or None"},
    {"get_many", CN_FAST(client_get_many), METH_FASTCALL,
     "get_many(slot, keys) -> list of chunks; ends at the first absent key"},
    {"lease_many", CN_FAST(client_lease_many), METH_FASTCALL,
     "lease_many(slot, keys) -> Batch; ends at the first absent key"},
    {"match", CN_FAST(client_match), METH_FASTCALL,
     "match(slot, keys) -> length of the longest present prefix; takes no lease"},
    {"open", CN_FAST(client_open), METH_FASTCALL, "open(ref, key_head) -> chunk or None"},
    {"put", CN_FAST(cn_client_put), METH_FASTCALL,
     "put(slot, key, nbytes, parent, position, ttl_s, priority, meta, wait_ms) -> put; None when "
     "this session takes no puts"},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef client_getset[] = {
    {"accepting", client_get_accepting, client_set_accepting,
     "May puts be made: a writer's session whose daemon is there.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot client_slots[] = {
    {Py_tp_doc, "Client(pointer, owner, chunk_type, put_type, pool, checksum): one attached "
                "session: hits and puts."},
    {Py_tp_new, client_new},
    {Py_tp_dealloc, client_dealloc},
    {Py_tp_methods, client_methods},
    {Py_tp_getset, client_getset},
    {0, NULL},
};

PyType_Spec cn_client_spec = {
    "cenote._native._lease.Client", sizeof(Client), 0, Py_TPFLAGS_DEFAULT, client_slots,
};
