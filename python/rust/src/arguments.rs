//! Functions of the module and their arguments.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyCFunction, PyDict, PyTuple};
use std::ffi::CStr;

/// What a function is called with.
pub struct Arguments<'a, 'py> {
    function: &'static CStr,
    in_order: &'a Bound<'py, PyTuple>,
    by_name: Option<&'a Bound<'py, PyDict>>,
}

impl<'py> Arguments<'_, 'py> {
    pub fn python(&self) -> Python<'py> {
        self.in_order.py()
    }

    /// # Errors
    /// TypeError unless there are so many arguments in order, and no others than these by name.
    pub fn expect(&self, in_order: usize, by_name: &[&str]) -> PyResult<()> {
        if self.in_order.len() != in_order {
            let got = self.in_order.len();
            return Err(self.wrong(format!("{in_order} arguments in order, got {got}")));
        }
        for name in self.by_name.iter().flat_map(|named| named.keys()) {
            let name: String = name.extract()?;
            if !by_name.contains(&name.as_str()) {
                return Err(self.wrong(format!("no argument `{name}`, got one")));
            }
        }
        Ok(())
    }

    /// The argument at a place.
    ///
    /// # Errors
    /// When it is not there, or no `T`.
    pub fn at<T: for<'a> FromPyObject<'a, 'py, Error = PyErr>>(&self, place: usize) -> PyResult<T> {
        self.in_order.get_item(place)?.extract()
    }

    /// The argument of a name.
    ///
    /// # Errors
    /// When it is not there, or no `T`.
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

/// Adds a function that returns nothing, or a number.
///
/// # Errors
/// Those of the interpreter.
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
