//! Converts arguments from Python to the fields of a kernel's typed call.

use pyo3::prelude::*;
use routegrad::kernels::{Buffer, In, Out};

/// A tensor's memory, `(address, bytes)` in Python. The caller keeps the tensor alive while the launch runs.
pub struct Memory(Buffer);

impl<'py> FromPyObject<'_, 'py> for Memory {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let (address, bytes) = object.extract()?;
        // SAFETY: the operators pass the address and size of a tensor on the stream's device.
        Ok(Memory(unsafe { Buffer::from_address(address, bytes) }))
    }
}

/// An argument that can be converted to a field of type `F`.
pub trait Field<'a, F> {
    fn field(&'a self) -> F;
}

impl<'a, T> Field<'a, In<'a, T>> for Memory {
    fn field(&'a self) -> In<'a, T> {
        self.0.input()
    }
}

impl<'a, T> Field<'a, Out<'a, T>> for Memory {
    fn field(&'a self) -> Out<'a, T> {
        self.0.output()
    }
}

impl<'a, F> Field<'a, Option<F>> for Option<Memory>
where
    Memory: Field<'a, F>,
{
    fn field(&'a self) -> Option<F> {
        self.as_ref().map(Field::field)
    }
}

macro_rules! values {
    ($($type:ty),*) => {
        $(impl Field<'_, $type> for $type {
            fn field(&self) -> $type {
                *self
            }
        })*
    };
}
values!(usize, i32, f32, bool);
