/* SPDX-License-Identifier: Apache-2.0 */
/* What is copied into a put: one buffer, or the pieces of an engine's cache. */
#include <string.h>

#include "cn_region.h"
#include "lease.h"

/* ---- one copy, whatever its source ---------------------------------------- */

/* bytes from source, or, where that is NULL, the pieces; to offset of the extent. */
struct fill {
    Py_ssize_t offset;
    uint64_t bytes;
    const void *source;
    struct cn_pieces pieces;
};

static int copy_in(Extent *extent, const struct fill *fill, uint32_t *crc)
{
    void *target = (uint8_t *)extent->grant.data + fill->offset;
    const uint64_t from = (uint64_t)(uintptr_t)fill->source;
    const struct cn_pieces one = {&from, &fill->bytes, 1, fill->bytes};
    if (fill->source == NULL)
        return cn_guarded_gather(target, &fill->pieces, crc);
    return crc == NULL ? cn_guarded_copy_in(target, fill->source, fill->bytes)
                       : cn_guarded_gather(target, &one, crc); /* which continues a CRC */
}

/* Long copies let other threads run; the extent stays, whatever they do to this put. */
static int copy_in_unlocked(Extent *extent, const struct fill *fill, uint32_t *crc)
{
    int status;
    Py_INCREF((PyObject *)extent);
    extent->exports++;
    Py_BEGIN_ALLOW_THREADS status = copy_in(extent, fill, crc);
    Py_END_ALLOW_THREADS extent->exports--;
    Py_DECREF((PyObject *)extent);
    return status;
}

static int check_fits(const Put *self, const struct fill *fill)
{
    uint64_t room = self->record.data_bytes;
    if (fill->offset >= 0 && fill->bytes <= room && (uint64_t)fill->offset <= room - fill->bytes)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "%llu bytes at offset %zd do not fit into the %llu bytes of this put: "
                 "reserve as many as you have",
                 (unsigned long long)fill->bytes, fill->offset, (unsigned long long)room);
    return -1;
}

static PyObject *refuse_pieces(const struct cn_pieces *pieces)
{
    for (uint64_t i = 0; i < pieces->count; i++) {
        uint64_t addr = pieces->addresses[i];
        uint64_t bytes = pieces->lengths[i];
        if (addr == 0 || addr > UINTPTR_MAX - bytes)
            return PyErr_Format(PyExc_ValueError,
                                "piece %llu has %llu bytes at address %llu, where no memory is: "
                                "nothing was copied",
                                (unsigned long long)i, (unsigned long long)bytes,
                                (unsigned long long)addr);
    }
    PyErr_SetString(PyExc_ValueError, "another thread changed the arrays during the copy, so that "
                                      "it is not known what was copied: copy again");
    return NULL;
}

static PyObject *refuse(const Put *self, const struct fill *fill, int status)
{
    if (status == CN_EINVAL)
        return refuse_pieces(&fill->pieces);
    return cn_raise_error(status, PyUnicode_FromFormat("copy %llu bytes into pool %R",
                                                       (unsigned long long)fill->bytes,
                                                       self->client->pool));
}

/*
 * Copies that follow each other from the first byte to the last make the chunk's CRC in passing.
 * Nothing is known of the bytes (summed is 0) after a gap or a step back, while somebody else may
 * write (lent, or the extent has exports), or when another copy began before this one was done.
 */
static PyObject *fill_put(Put *self, const struct fill *fill)
{
    if (cn_client_forked(self->client->client))
        return cn_raise_status(CN_EFORKED); /* the region is not mapped here (I13) */
    if (check_fits(self, fill) != 0)
        return NULL;
    bool follows = fill->offset == 0 || fill->offset == self->summed;
    bool sums = follows && self->client->checksum != CHECKSUM_OFF && !self->lent &&
                self->extent->exports == 0;
    uint32_t crc = fill->offset == 0 ? 0 : self->summed_crc;
    uint32_t edit = ++self->edits;
    self->summed = 0;
    self->record.flags &= ~(uint32_t)CN_RF_CRC;
    int status = (fill->bytes < CN_KEEP_GIL_BELOW_BYTES ? copy_in : copy_in_unlocked)(
        self->extent, fill, sums ? &crc : NULL);
    if (status != CN_OK)
        return refuse(self, fill, status);
    if (sums && !self->lent && edit == self->edits) {
        self->summed = fill->offset + (Py_ssize_t)fill->bytes;
        self->summed_crc = crc;
        if ((uint64_t)self->summed == self->record.data_bytes) {
            self->record.crc32c = crc;
            self->record.flags |= CN_RF_CRC;
        }
    }
    return PyLong_FromUnsignedLongLong(fill->bytes);
}

/* ---- arguments ------------------------------------------------------------ */

#define ARGUMENTS_MAX 3

/* Arguments by place or by name; the last of them is an offset and may be left out. */
static int take_arguments(PyObject *const *args, Py_ssize_t nargs, PyObject *names,
                          const char *const *known, int count, const char *usage,
                          PyObject **ret_given, Py_ssize_t *ret_offset)
{
    Py_ssize_t named = names == NULL ? 0 : PyTuple_Size(names);
    bool right = nargs <= count;
    for (int i = 0; i < count; i++)
        ret_given[i] = i < nargs ? args[i] : NULL;
    for (Py_ssize_t i = 0; i < named && right; i++) {
        int at = 0;
        while (at < count &&
               PyUnicode_CompareWithASCIIString(PyTuple_GetItem(names, i), known[at]) != 0)
            at++;
        right = at < count && ret_given[at] == NULL;
        if (right)
            ret_given[at] = args[nargs + i];
    }
    for (int i = 0; i < count - 1 && right; i++)
        right = ret_given[i] != NULL;
    if (!right) {
        PyErr_SetString(PyExc_TypeError, usage);
        return -1;
    }
    PyObject *offset = ret_given[count - 1];
    *ret_offset = offset == NULL ? 0 : PyNumber_AsSsize_t(offset, PyExc_OverflowError);
    return *ret_offset == -1 && PyErr_Occurred() ? -1 : 0;
}

/* ---- copy_from ------------------------------------------------------------ */

/* The plain buffer of source, or of what _buffer_of() makes of it (tensors, bfloat16 arrays). */
static int open_source(PyObject *self, PyObject *source, Py_buffer *ret_buffer)
{
    if (PyObject_GetBuffer(source, ret_buffer, PyBUF_SIMPLE) == 0)
        return 0;
    PyErr_Clear();
    PyObject *plain = PyObject_CallMethod(self, "_buffer_of", "O", source);
    int failed = plain == NULL ? -1 : PyObject_GetBuffer(plain, ret_buffer, PyBUF_SIMPLE);
    Py_XDECREF(plain);
    return failed;
}

PyObject *cn_put_copy_from(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                           PyObject *names)
{
    static const char *const known[] = {"source", "offset"};
    Put *self = (Put *)object;
    PyObject *given[ARGUMENTS_MAX];
    Py_ssize_t offset;
    Py_buffer buffer;
    if (take_arguments(args, nargs, names, known, 2,
                       "copy_from() takes a source and, perhaps, an offset", given, &offset) != 0 ||
        cn_put_check_open(self, "nothing can be copied into it any more") != 0 ||
        open_source(object, given[0], &buffer) != 0)
        return NULL;
    PyObject *copied = NULL;
    if (cn_put_check_open(self, "it ended while the source was looked at") == 0) {
        struct fill fill = {.offset = offset, .bytes = (uint64_t)buffer.len, .source = buffer.buf};
        copied = fill_put(self, &fill);
    }
    PyBuffer_Release(&buffer);
    return copied;
}

/* ---- copy_pieces ---------------------------------------------------------- */

/* The formats of an unsigned number of 64 bits, here: array and numpy say Q or L, ctypes <L. */
static bool is_u64(const Py_buffer *buffer)
{
    const char *format = buffer->format == NULL ? "B" : buffer->format;
    if (*format != '\0' && strchr("@=<", *format) != NULL)
        format++;
    return buffer->itemsize == 8 && (strcmp(format, "Q") == 0 || strcmp(format, "L") == 0);
}

static int open_numbers(PyObject *object, const char *name, Py_buffer *ret_buffer)
{
    if (!PyObject_CheckBuffer(object)) {
        PyErr_Format(PyExc_TypeError,
                     "%s is %R, which has no buffer: give an array('Q') or a uint64 array", name,
                     Py_TYPE(object));
        return -1;
    }
    if (PyObject_GetBuffer(object, ret_buffer, PyBUF_ND | PyBUF_FORMAT) != 0) {
        if (PyErr_ExceptionMatches(PyExc_BufferError)) /* numpy says ValueError itself */
            PyErr_Format(PyExc_ValueError, "%s is not contiguous: make it so", name);
        return -1;
    }
    bool aligned = ret_buffer->len == 0 || (uintptr_t)ret_buffer->buf % 8 == 0;
    if (is_u64(ret_buffer) && ret_buffer->ndim == 1 && aligned)
        return 0;
    PyErr_Format(
        PyExc_ValueError,
        "%s has %d dimensions of format '%s' at %p: give one dimension of unsigned numbers "
        "of 64 bits, aligned to 8 bytes, as an array('Q') or a uint64 array",
        name, ret_buffer->ndim, ret_buffer->format == NULL ? "B" : ret_buffer->format,
        ret_buffer->buf);
    PyBuffer_Release(ret_buffer);
    return -1;
}

static PyObject *copy_numbers(Put *self, const Py_buffer *addresses, const Py_buffer *lengths,
                              Py_ssize_t offset)
{
    struct fill fill = {
        .offset = offset,
        .pieces = {addresses->buf, lengths->buf, (uint64_t)addresses->len / 8, 0},
    };
    if (addresses->len != lengths->len)
        return PyErr_Format(PyExc_ValueError,
                            "there are %zd addresses and %zd lengths: give a length for each",
                            addresses->len / 8, lengths->len / 8);
    if (cn_pieces_bytes(fill.pieces.lengths, fill.pieces.count, &fill.pieces.bytes) != CN_OK)
        return PyErr_Format(PyExc_ValueError,
                            "the %llu lengths are together larger than any memory, and this put "
                            "has %llu bytes: look at what they count",
                            (unsigned long long)fill.pieces.count,
                            (unsigned long long)self->record.data_bytes);
    fill.bytes = fill.pieces.bytes;
    return fill_put(self, &fill);
}

PyObject *cn_put_copy_pieces(PyObject *object, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *names)
{
    static const char *const known[] = {"addresses", "lengths", "offset"};
    Put *self = (Put *)object;
    PyObject *given[ARGUMENTS_MAX];
    Py_ssize_t offset;
    Py_buffer addresses;
    Py_buffer lengths;
    if (take_arguments(args, nargs, names, known, 3,
                       "copy_pieces() takes addresses, lengths and, perhaps, an offset", given,
                       &offset) != 0 ||
        cn_put_check_open(self, "nothing can be copied into it any more") != 0 ||
        open_numbers(given[0], "addresses", &addresses) != 0)
        return NULL;
    PyObject *copied = NULL;
    if (open_numbers(given[1], "lengths", &lengths) == 0) {
        if (cn_put_check_open(self, "it ended while the arrays were looked at") == 0)
            copied = copy_numbers(self, &addresses, &lengths, offset);
        PyBuffer_Release(&lengths);
    }
    PyBuffer_Release(&addresses);
    return copied;
}
