//! Creates the module.

use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::CStr;
use std::ptr;

/// Creates the module, and calls `fill` to add its functions. If that fails, sets an exception and returns null.
///
/// # Safety
/// The calling thread must hold the interpreter's lock. Must be called only once.
pub unsafe fn initialize(
    name: &'static CStr,
    fill: impl FnOnce(&Bound<'_, PyModule>) -> PyResult<()>,
) -> *mut ffi::PyObject {
    let definition = Box::leak(Box::new(ffi::PyModuleDef {
        m_base: ffi::PyModuleDef_HEAD_INIT,
        m_name: name.as_ptr(),
        m_doc: ptr::null(),
        m_size: -1,
        m_methods: ptr::null_mut(),
        m_slots: ptr::null_mut(),
        m_traverse: None,
        m_clear: None,
        m_free: None,
    }));
    // SAFETY: the caller holds the lock, the definition is never freed, and the new module is owned here or null.
    let (py, module) = unsafe {
        let py = Python::assume_attached();
        let module = ffi::PyModule_Create(definition);
        (py, Bound::from_owned_ptr_or_err(py, module))
    };
    let filled = module.and_then(|module| {
        let module = module.cast_into::<PyModule>()?;
        fill(&module)?;
        Ok(module.into_ptr())
    });
    filled.unwrap_or_else(|error| {
        error.restore(py);
        ptr::null_mut()
    })
}
