// The Python module around the ops: importing it registers them. It is compiled once for each of _cpu and
// _cuda.
#include <Python.h>

#ifndef USE_CUDA
#include "cpu/isa.h"
#endif

namespace {

#ifndef USE_CUDA
using fastprune::Isa;

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(fastprune::isa_name(fastprune::isa())); }

PyObject* supported_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (Isa isa : fastprune::supported_isas()) {
    PyObject* name = PyUnicode_FromString(fastprune::isa_name(isa));
    PyList_Append(names, name);
    Py_DECREF(name);
  }
  return names;
}

PyObject* set_isa(PyObject*, PyObject* argument) {
  PyObject* bytes = PyUnicode_AsUTF8String(argument);
  if (!bytes) return nullptr;
  const bool known = fastprune::set_isa(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  if (!known) {
    PyErr_Format(PyExc_ValueError, "this build or this CPU has no instruction set %R", argument);
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set in use."},
    {"supported_isas", supported_isas, METH_NOARGS, "Those of this build that this CPU has, slowest first."},
    {"set_isa", set_isa, METH_O, "Choose one of supported_isas()."},
    {nullptr, nullptr, 0, nullptr},
};
#else
PyMethodDef methods[] = {{nullptr, nullptr, 0, nullptr}};
#endif

#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          STRING(FASTPRUNE_MODULE),
                          nullptr,
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC JOIN(PyInit_, FASTPRUNE_MODULE)() {
#ifndef USE_CUDA
  // A wrong name must not pass for the default.
  if (const char* wrong = fastprune::init_isa())
    return PyErr_Format(PyExc_ImportError, "FASTPRUNE_CPU_ISA=%s: this build or this CPU does not have it",
                        wrong);
#endif
  return PyModule_Create(&definition);
}
