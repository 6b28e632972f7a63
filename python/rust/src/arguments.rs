//! Adds functions to the module, and reads their arguments.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyCFunction, PyDict, PyTuple};
use std::ffi::CStr;

/// The arguments of a call.
pub struct Arguments<'a, 'py> {
    function: &'static CStr,
    in_order: &'a Bound<'py, PyTuple>,
    by_name: Option<&'a Bound<'py, PyDict>>,
}

impl<'py> Arguments<'_, 'py> {
    pub fn python(&self) -> Python<'py> {
        self.in_order.py()
    }

    /// Checks the number of positional arguments and the names of the keyword arguments.
    ///
    /// # Errors
    /// TypeError if the number is different, or a keyword argument has another name.
    pub fn expect(&self, in_order: usize, by_name: &[&str]) -> PyResult<()> {
        if self.in_order.len() != in_order {
            let got = self.in_order.len();
            return Err(self.wrong(format!("{in_order} positional argument(s), got {got}")));
        }
        for name in self.by_name.iter().flat_map(|named| named.keys()) {
            let name: String = name.extract()?;
            if !by_name.contains(&name.as_str()) {
                return Err(self.wrong(format!("no argument `{name}`, got one")));
            }
        }
        Ok(())
    }

    /// Returns the positional argument with the index `place`.
    ///
    /// # Errors
    /// If it is missing, or is not a `T`.
    pub fn at<T: for<'a> FromPyObject<'a, 'py, Error = PyErr>>(&self, place: usize) -> PyResult<T> {
        self.in_order.get_item(place)?.extract()
    }

    /// Returns the keyword argument `name`.
    ///
    /// # Errors
    /// If it is missing, or is not a `T`.
    pub fn named<T: for<'a> FromPyObject<'a, 'py, Error = PyErr>>(
        &self,
        name: &str,
    ) -> PyResult<T> {
        let value = match self.by_name {
            Some(named) => named.get_item(name)?,
            None => None,
        };
        let value = value.ok_or_else(|| self.wrong(format!("an argument `{name}`, got none")))?;
        value.extract()
    }

    fn wrong(&self, what: String) -> PyErr {
        PyTypeError::new_err(format!(
            "{}: expected {what}",
            self.function.to_string_lossy()
        ))
    }
}

/// Adds a function that returns a number or None.
///
/// # Errors
/// If the interpreter cannot create the function.
pub fn add_function(
    module: &Bound<'_, PyModule>,
    name: &'static CStr,
    call: impl Fn(&Arguments<'_, '_>) -> PyResult<Option<usize>> + Send + Sync + 'static,
) -> PyResult<()> {
    let function = PyCFunction::new_closure(
        module.py(),
        Some(name),
        None,
        move |in_order: &Bound<'_, PyTuple>, by_name: Option<&Bound<'_, PyDict>>| {
            call(&Arguments {
                function: name,
                in_order,
                by_name,
            })
        },
    )?;
    module.add(name, function)
}
