//! Tensors: a shape and a dtype over shared memory, always contiguous and row-major.
//!
//! Cloning shares the memory; writing to shared memory copies it first, so a tensor is a value.

pub mod cpu;
pub mod dtype;
pub mod random;
pub mod shape;

use crate::device::{Device, Memory, Span};
use crate::dist::Collective;
use crate::error::{Error, Result};
use crate::tensor::dtype::{DType, Element};
use crate::tensor::shape::Shape;
use crate::with_real;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// An array of elements of one dtype on one device.
#[derive(Clone)]
pub struct Tensor {
    memory: Arc<Memory>,
    shape: Shape,
    dtype: DType,
    device: Device,
}

impl Tensor {
    /// Creates a tensor whose elements are unspecified until written.
    pub fn unspecified(device: Device, dtype: DType, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        Tensor {
            memory: Arc::new(Memory::unspecified(shape.elements() * dtype.size())),
            shape,
            dtype,
            device,
        }
    }

    /// Creates a tensor of zeros.
    pub fn zeros(device: Device, dtype: DType, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        Tensor {
            memory: Arc::new(Memory::zeros(shape.elements() * dtype.size())),
            shape,
            dtype,
            device,
        }
    }

    /// Creates a tensor on the CPU with the given elements.
    ///
    /// # Panics
    /// Panics when the number of elements does not match the shape.
    pub fn from_slice<T: Element>(shape: impl Into<Shape>, elements: &[T]) -> Self {
        let mut t = Self::unspecified(Device::Cpu, T::DTYPE, shape);
        t.slice_mut::<T>().copy_from_slice(elements);
        t
    }

    /// Returns a tensor on `device` with the given elements, for constants that every step needs. On a device with
    /// kernels it is created once and cached, so that the elements are not copied again.
    pub fn constant<T: Element>(device: Device, shape: impl Into<Shape>, elements: &[T]) -> Self {
        type Key = (Device, DType, Vec<u8>);
        thread_local! {
            static KEPT: RefCell<HashMap<Key, Tensor>> = RefCell::default();
        }
        let shape = shape.into();
        let new = || Self::from_slice(shape, elements).on(device);
        if device == Device::Cpu {
            return new();
        }
        let bytes = bytemuck::cast_slice(elements).to_vec();
        KEPT.with_borrow_mut(|kept| {
            let kept = kept.entry((device, T::DTYPE, bytes)).or_insert_with(new);
            kept.pointer::<T>(); // on the device before the tensor is cloned
            Tensor {
                shape,
                ..kept.clone()
            }
        })
    }

    /// Creates a scalar on the CPU.
    pub fn scalar<T: Element>(value: T) -> Self {
        Self::from_slice(Shape::from([]), &[value])
    }

    /// Creates a tensor with the shape, dtype and device of this one, and unspecified elements.
    pub fn unspecified_like(&self) -> Self {
        Self::unspecified(self.device, self.dtype, self.shape)
    }

    /// Returns the extents, at most four.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Returns the type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Returns the device that holds the elements.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Returns the number of elements.
    pub fn elements(&self) -> usize {
        self.shape.elements()
    }

    /// Returns the elements.
    ///
    /// # Panics
    /// Panics when `T` is not the tensor's dtype: operations check dtypes before they call this function.
    pub fn slice<T: Element>(&self) -> &[T] {
        assert_eq!(self.dtype, T::DTYPE, "dtype of the requested elements");
        bytemuck::cast_slice(self.memory.bytes())
    }

    /// Returns the elements for writing; copies them first if the memory is shared.
    ///
    /// # Panics
    /// Panics when `T` is not the tensor's dtype.
    pub fn slice_mut<T: Element>(&mut self) -> &mut [T] {
        assert_eq!(self.dtype, T::DTYPE, "dtype of the requested elements");
        bytemuck::cast_slice_mut(self.bytes_mut())
    }

    /// Returns the raw bytes.
    pub fn bytes(&self) -> &[u8] {
        self.memory.bytes()
    }

    /// Returns the raw bytes for writing; copies them first if the memory is shared.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.own_memory().bytes_mut()
    }

    /// Returns a copy of a range of the raw bytes, for writing large tensors to a file. If kernels wrote the bytes,
    /// the tensor does not keep a copy in host memory.
    ///
    /// # Errors
    /// Returns an error when the device failed.
    pub fn copied_bytes(&self, range: Range<usize>) -> Result<Vec<u8>> {
        self.memory.copied(range)
    }

    /// Returns a copy of consecutive elements, beginning with `first`, on the same device.
    ///
    /// # Errors
    /// Returns an error when the device does not have enough memory.
    ///
    /// # Panics
    /// Panics when there are fewer elements.
    pub fn part(&self, first: usize, shape: impl Into<Shape>) -> Result<Self> {
        let (shape, size) = (shape.into(), self.dtype.size());
        assert!(
            first + shape.elements() <= self.elements(),
            "elements of the part"
        );
        let bytes = first * size..(first + shape.elements()) * size;
        Ok(Tensor {
            memory: Arc::new(self.memory.duplicate(bytes)?),
            shape,
            ..*self
        })
    }

    /// Returns the memory for writing; copies it first if it is shared.
    ///
    /// # Panics
    /// Panics when the device does not have enough memory for a copy.
    fn own_memory(&mut self) -> &mut Memory {
        if Arc::get_mut(&mut self.memory).is_none() {
            let all = 0..self.elements() * self.dtype.size();
            let own = self.memory.duplicate(all).unwrap_or_else(|e| panic!("{e}"));
            self.memory = Arc::new(own);
        }
        match Arc::get_mut(&mut self.memory) {
            Some(memory) => memory,
            None => unreachable!("the memory was made unique above"),
        }
    }

    /// Returns the same elements on another device. This copies nothing: [`Memory`] copies when the elements are
    /// first used there.
    pub fn on(&self, device: Device) -> Self {
        Tensor {
            device,
            ..self.clone()
        }
    }

    /// Returns a bf16 tensor converted to f32 (exact), and any other tensor unchanged.
    pub fn widened(&self) -> Self {
        if self.dtype != DType::Bf16 {
            return self.clone();
        }
        let mut out = Self::unspecified(self.device, DType::F32, self.shape);
        self.slice::<bf16>()
            .convert_to_f32_slice(out.slice_mut::<f32>());
        out
    }

    /// Returns an f32 tensor rounded to bf16, ties to even, as kernels round activations, and any other tensor
    /// unchanged.
    pub fn narrowed(&self) -> Self {
        if self.dtype != DType::F32 {
            return self.clone();
        }
        let mut out = Self::unspecified(self.device, DType::Bf16, self.shape);
        out.slice_mut::<bf16>()
            .convert_from_f32_slice(self.slice::<f32>());
        out
    }

    /// Returns the address of the elements for a kernel of the tensor's device that reads them.
    ///
    /// # Panics
    /// Panics when the device does not have enough memory, or has no kernels.
    pub fn pointer<T>(&self) -> *const T {
        let address = self.memory.address(self.device);
        address.unwrap_or_else(|e| panic!("{e}")) as *const T
    }

    /// Returns the address of the elements for a kernel that writes them; copies them first if they are shared.
    ///
    /// # Panics
    /// Panics in the same cases as [`pointer`](Self::pointer).
    pub fn pointer_mut<T>(&mut self) -> *mut T {
        let device = self.device;
        let address = self.own_memory().address_mut(device);
        address.unwrap_or_else(|e| panic!("{e}")) as *mut T
    }

    /// Returns the memory range of some elements on the tensor's device, for reading.
    ///
    /// # Panics
    /// Panics in the same cases as [`pointer`](Self::pointer), and when there are fewer elements.
    pub fn span(&self, elements: Range<usize>) -> Span {
        let (address, width) = (self.pointer::<u8>() as usize, self.dtype.size());
        // SAFETY: the tensor owns the memory, which its device reuses only for later launches.
        let all = unsafe { Span::from_address(self.device, address, self.elements() * width) };
        all.part(elements.start * width..elements.end * width)
    }

    /// Returns the memory range of the elements on the tensor's device, for writing; copies them first if they are
    /// shared.
    ///
    /// # Panics
    /// Panics in the same cases as [`pointer`](Self::pointer).
    pub fn span_mut(&mut self) -> Span {
        let (address, bytes) = (
            self.pointer_mut::<u8>() as usize,
            self.elements() * self.dtype.size(),
        );
        // SAFETY: as above.
        unsafe { Span::from_address(self.device, address, bytes) }
    }

    /// Replaces the elements of a real tensor by their sums over the ranks, computed in f64.
    ///
    /// # Errors
    /// Returns an error when the dtype is not real, and the errors of [`Collective::sum`].
    pub fn sum_over_ranks(&mut self, dist: &dyn Collective) -> Result<()> {
        if dist.size() == 1 {
            return Ok(());
        }
        let mut values = self.to_f64()?;
        dist.sum(&mut values)?;
        with_real!(self.dtype, "sum over ranks", |T| {
            let elements = self.slice_mut::<T>().iter_mut().zip(values);
            elements.for_each(|(x, v)| *x = crate::tensor::dtype::Real::of(v));
            Ok(())
        })
    }

    /// Returns the same elements with another shape.
    ///
    /// # Errors
    /// Returns an error when the two shapes differ in their number of elements.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if shape.elements() != self.shape.elements() {
            return Err(Error::invalid(
                "reshape",
                format!("{} elements", self.shape.elements()),
                format!("shape {shape}"),
                "keep the number of elements",
            ));
        }
        Ok(Tensor {
            shape,
            ..self.clone()
        })
    }

    /// Returns the value of a tensor that has one real element.
    ///
    /// # Errors
    /// Returns an error when it has more than one element or is not real.
    pub fn item(&self) -> Result<f64> {
        if self.elements() != 1 {
            return Err(Error::invalid(
                "item",
                "one element",
                format!("shape {}", self.shape),
                "reduce the tensor first",
            ));
        }
        with_real!(self.dtype, "item", |T| Ok(crate::tensor::dtype::Real::f64(
            self.slice::<T>()[0]
        )))
    }

    /// Returns all elements of a real tensor, converted to f64.
    ///
    /// # Errors
    /// Returns an error when the dtype is not real.
    pub fn to_f64(&self) -> Result<Vec<f64>> {
        let own = self.widened();
        with_real!(own.dtype, "to_f64", |T| Ok(own
            .slice::<T>()
            .iter()
            .map(|&x| crate::tensor::dtype::Real::f64(x))
            .collect()))
    }

    /// Checks the shape for operation `op`; `what` is the name of the tensor in the error.
    pub fn expect_shape(&self, op: &str, what: &str, shape: impl Into<Shape>) -> Result<()> {
        let shape = shape.into();
        if self.shape == shape {
            return Ok(());
        }
        Err(Error::invalid(
            op,
            format!("{what} of shape {shape}"),
            format!("{}", self.shape),
            "pass tensors whose shapes match",
        ))
    }

    /// Checks the dtype for operation `op`; `what` is the name of the tensor in the error.
    pub fn expect_dtype(&self, op: &str, what: &str, dtype: DType) -> Result<()> {
        if self.dtype == dtype {
            return Ok(());
        }
        Err(Error::invalid(
            op,
            format!("{what} of dtype {dtype}"),
            self.dtype.to_string(),
            "pass tensors of one dtype",
        ))
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Tensor({} {} on {})",
            self.dtype, self.shape, self.device
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_to_a_shared_tensor_does_not_change_the_other_owner() {
        let a = Tensor::from_slice([2], &[1f32, 2.0]);
        let mut b = a.clone();
        b.slice_mut::<f32>()[0] = 5.0;
        assert_eq!(a.slice::<f32>(), [1.0, 2.0]);
        assert_eq!(b.slice::<f32>(), [5.0, 2.0]);
    }

    #[test]
    fn reshape_refuses_another_number_of_elements() {
        let a = Tensor::zeros(Device::Cpu, DType::F32, [2, 3]);
        assert_eq!(*a.reshape([3, 2]).unwrap().shape(), [3, 2]);
        assert!(a.reshape([4]).is_err());
    }
}
