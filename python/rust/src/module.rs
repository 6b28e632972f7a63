//! The module's start.

use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::CStr;
use std::ptr;

/// Makes the module and has `fill` add its functions; null, with an exception set, where that fails.
///
/// # Safety
/// The calling thread holds the interpreter's lock, and calls it once.
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
    // SAFETY: the caller's word; the definition is never freed, and the new module is owned here or null.
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
