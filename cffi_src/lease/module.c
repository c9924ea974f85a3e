/* SPDX-License-Identifier: Apache-2.0 */
#include "lease.h"

static int add_type(PyObject *module, PyType_Spec *spec, const char *name)
{
    PyObject *type = PyType_FromSpec(spec);
    if (type == NULL)
        return -1;
    int failed = PyModule_AddObjectRef(module, name, type);
    Py_DECREF(type);
    return failed;
}

static int module_exec(PyObject *module)
{
    if (add_type(module, &cn_lease_spec, "Lease") != 0 ||
        add_type(module, &cn_batch_spec, "Batch") != 0 ||
        add_type(module, &cn_extent_spec, "Extent") != 0 ||
        add_type(module, &cn_put_spec, "Put") != 0 ||
        add_type(module, &cn_span_spec, "Span") != 0 ||
        add_type(module, &cn_client_spec, "Client") != 0)
        return -1;
    return PyModule_AddIntConstant(module, "KEEP_GIL_BELOW_BYTES", CN_KEEP_GIL_BELOW_BYTES);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static PyMethodDef module_methods[] = {
    {"install_guard", cn_lease_install_guard, METH_NOARGS,
     "Turn SIGBUS under copy_to() into ChunkLost, once for the process."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_lease",
    .m_doc = "Leases as Python objects: the hit path.",
    .m_methods = module_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__lease(void);

PyMODINIT_FUNC PyInit__lease(void) { return PyModuleDef_Init(&module_def); }
