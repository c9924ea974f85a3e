/* SPDX-License-Identifier: Apache-2.0 */
/* Client.put(): what a put is given, checked, and an extent for it. */
#include <string.h>

#include "lease.h"

enum { KEY, NBYTES, PARENT, POSITION, TTL_S, PRIORITY, META, WAIT_MS, ARGUMENTS };

/* 32 bytes as a bytes object, or NULL with an exception set. */
static PyObject *key_of(PyObject *object, const char *what)
{
    PyObject *key = PyBytes_CheckExact(object) ? Py_NewRef(object) : NULL;
    if (key == NULL && PyObject_CheckBuffer(object))
        key = PyBytes_FromObject(object);
    else if (key == NULL)
        PyErr_Format(PyExc_TypeError, "the %s is a %R: give 32 bytes", what, Py_TYPE(object));
    if (key == NULL || PyBytes_Size(key) == CN_KEY_BYTES)
        return key;
    PyErr_Format(PyExc_ValueError, "the %s has %zd bytes: a key has 32", what, PyBytes_Size(key));
    Py_DECREF(key);
    return NULL;
}

/* The whole number that object is, between least and most. */
static int number_of(PyObject *object, const char *name, long long least, long long most,
                     const char *wanted, long long *ret_number)
{
    int overflow;
    long long number = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (number == -1 && overflow == 0 && PyErr_Occurred())
        return -1;
    if (overflow > 0 && most == INT64_MAX) {
        overflow = 0; /* the core knows what is too much */
        number = INT64_MAX;
    }
    if (overflow == 0 && number >= least && number <= most) {
        *ret_number = number;
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s is %R: give %s", name, object, wanted);
    return -1;
}

static uint32_t position_behind(uint32_t before)
{
    return before < CN_POSITION_UNKNOWN - 1 ? before + 1 : CN_POSITION_UNKNOWN;
}

/* One behind the parent's; CN_POSITION_UNKNOWN when that is not known here (yet). */
static uint32_t position_after(const Client *client, uint32_t slot, PyObject *parent)
{
    const void *catalog = cn_client_catalog(client->client);
    struct cn_chunk chunk;
    struct cn_cold cold;
    uint32_t d;
    if (cn_find(catalog, slot, (const uint8_t *)PyBytes_AsString(parent), &d) != CN_OK ||
        cn_chunk_read(catalog, d, &chunk, &cold) != CN_OK)
        return CN_POSITION_UNKNOWN;
    return position_behind(cold.position);
}

/* Key, chunk or put. Sets key and position of the parent's successor. */
static int take_parent(Put *self, PyObject *parent)
{
    Client *client = self->client;
    if (parent == Py_None)
        return 0;
    if (PyObject_TypeCheck(parent, client->put_type)) {
        self->parent = Py_NewRef(((Put *)parent)->key);
        self->record.position = position_behind(((Put *)parent)->record.position);
        return 0;
    }
    if (PyObject_TypeCheck(parent, client->chunk_type))
        self->parent = PyObject_GetAttrString(parent, "key");
    else
        self->parent = key_of(parent, "parent");
    if (self->parent == NULL)
        return -1;
    self->record.position = position_after(client, self->record.ns_slot, self->parent);
    return 0;
}

/* All arguments but meta; what is not given stays zero. */
static int take_arguments(Put *self, PyObject *const *args)
{
    long long number;
    if ((self->key = key_of(args[KEY], "key")) == NULL || take_parent(self, args[PARENT]) != 0)
        return -1;
    if (number_of(args[NBYTES], "nbytes", 1, INT64_MAX, "1 at least", &number) != 0)
        return -1;
    self->record.data_bytes = (uint64_t)number;
    if (args[POSITION] != Py_None) {
        if (number_of(args[POSITION], "position", 0, UINT32_MAX, "0 .. 2^32-1", &number) != 0)
            return -1;
        self->record.position = (uint32_t)number;
    }
    if (args[TTL_S] != Py_None) {
        if (number_of(args[TTL_S], "ttl_s", 1, UINT32_MAX, "1 .. 2^32-1 seconds, or None for ever",
                      &number) != 0)
            return -1;
        self->record.ttl_s = (uint32_t)number;
    }
    if (number_of(args[PRIORITY], "priority", -128, 127, "-128 .. 127", &number) != 0)
        return -1;
    self->record.priority = (int32_t)number;
    if (number_of(args[WAIT_MS], "wait_ms", INT64_MIN, INT64_MAX, "milliseconds", &number) != 0)
        return -1;
    self->wait_ms = (uint32_t)(number < 0 ? 0 : number > UINT32_MAX ? UINT32_MAX : number);
    return 0;
}

/* ---- reserving ------------------------------------------------------------ */

static int reserve(Put *self, struct cn_grant *ret_grant)
{
    struct cn_client *client = self->client->client;
    uint64_t bytes = self->record.data_bytes;
    uint32_t meta_bytes = self->record.meta_bytes;
    int status = cn_reserve_now(client, bytes, meta_bytes, ret_grant);
    if (status != CN_EFULL)
        return status;
    /* Without the GIL: an empty stock means a wait for the keeper, whatever wait_ms says. */
    Py_BEGIN_ALLOW_THREADS status = cn_reserve(client, bytes, meta_bytes, self->wait_ms, ret_grant);
    Py_END_ALLOW_THREADS return status;
}

static int take_extent(Put *self, const Py_buffer *meta)
{
    Client *client = self->client;
    Extent *extent = (Extent *)client->extent_alloc(client->extent_type, 0);
    if (extent == NULL)
        return -1;
    extent->ended = true; /* until there is something to give back */
    extent->client = (Client *)Py_NewRef((PyObject *)client);
    extent->data_bytes = (Py_ssize_t)self->record.data_bytes;
    self->extent = extent;
    int status = reserve(self, &extent->grant);
    if (status != CN_OK) {
        cn_raise_error(status,
                       PyUnicode_FromFormat("reserve %zd bytes in pool %R, waiting at most %u ms",
                                            extent->data_bytes, client->pool, self->wait_ms));
        return -1;
    }
    extent->ended = false;
    self->record.ref = extent->grant.ref;
    if (meta->len > 0)
        cn_put_meta(client->client, &extent->grant, self->record.data_bytes, meta->buf,
                    (uint32_t)meta->len);
    return 0;
}

static int take_meta(Put *self, const Py_buffer *meta)
{
    if (meta->len > CN_META_BYTES_MAX) {
        PyErr_Format(PyExc_ValueError, "meta has %zd bytes, and %d are allowed", meta->len,
                     CN_META_BYTES_MAX);
        return -1;
    }
    self->record.meta_bytes = (uint32_t)meta->len;
    return 0;
}

PyObject *cn_client_put(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Client *client = (Client *)object;
    uint32_t slot;
    Py_buffer meta;
    if (cn_slot_of(args, nargs, 1 + ARGUMENTS, "put", &slot) != 0)
        return NULL;
    if (!client->accepting || cn_client_forked(client->client))
        Py_RETURN_NONE;
    args++;
    Put *self = (Put *)client->put_alloc(client->put_type, 0);
    if (self == NULL)
        return NULL;
    self->client = (Client *)Py_NewRef(object);
    self->record.ns_slot = slot;
    int failed = take_arguments(self, args);
    if (failed == 0 && (failed = PyObject_GetBuffer(args[META], &meta, PyBUF_SIMPLE)) == 0) {
        failed = take_meta(self, &meta) != 0 || take_extent(self, &meta) != 0;
        PyBuffer_Release(&meta);
    }
    if (failed == 0)
        return (PyObject *)self;
    Py_DECREF((PyObject *)self);
    return NULL;
}
