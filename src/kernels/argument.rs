//! Arguments of launchers: typed addresses with their lengths, sizes, and the stream.

use super::bindings::{
    routegrad_draws, routegrad_parameter, routegrad_state, routegrad_step_outcome,
    routegrad_step_settings, routegrad_stream, routegrad_unit_box,
};
use super::launchers::Launchers;
use crate::device::{ALIGNMENT, Device, graph};
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use half::bf16;
use std::ffi::c_void;
use std::marker::PhantomData;

/// A type of elements in device memory, and its C type in the launchers.
pub trait Element: Copy {
    /// The C type of the element in the launchers.
    type C: 'static;
    /// The dtype of tensors that may be passed as such elements; none if the bytes of the tensor hold structs.
    const DTYPE: Option<DType>;
}

macro_rules! elements {
    ($($type:ty => $c:ty, $dtype:expr;)*) => {
        $(impl Element for $type {
            type C = $c;
            const DTYPE: Option<DType> = $dtype;
        })*
    };
}
elements! {
    bf16 => c_void, Some(DType::Bf16);
    f32 => f32, Some(DType::F32);
    f64 => f64, Some(DType::F64);
    i32 => i32, Some(DType::I32);
    u8 => c_void, None;
    routegrad_draws => routegrad_draws, None;
    routegrad_parameter => routegrad_parameter, None;
    routegrad_state => routegrad_state, None;
    routegrad_step_outcome => routegrad_step_outcome, None;
    routegrad_step_settings => routegrad_step_settings, None;
}

/// Elements that a kernel reads.
pub struct In<'a, T> {
    address: usize,
    elements: usize,
    memory: PhantomData<&'a T>,
}

/// Elements that a kernel writes, and may read.
pub struct Out<'a, T> {
    address: usize,
    elements: usize,
    memory: PhantomData<&'a mut T>,
}

macro_rules! addresses {
    ($($Name:ident),*) => {
        $(
            impl<T> Clone for $Name<'_, T> {
                fn clone(&self) -> Self {
                    *self
                }
            }
            impl<T> Copy for $Name<'_, T> {}
            impl<T> $Name<'_, T> {
                /// # Safety
                /// `address` must point to at least `elements` elements in the memory of the stream's device for as
                /// long as the launch runs.
                pub unsafe fn from_address(address: usize, elements: usize) -> Self {
                    Self { address, elements, memory: PhantomData }
                }

                /// Returns the same memory, beginning with element `first`.
                ///
                /// # Panics
                /// Panics when there are fewer elements.
                pub fn from_element(self, first: usize) -> Self {
                    assert!(first <= self.elements, "element {first} of {}", self.elements);
                    Self {
                        address: self.address + first * size_of::<T>(),
                        elements: self.elements - first,
                        memory: PhantomData,
                    }
                }
            }
        )*
    };
}
addresses!(In, Out);

macro_rules! lists {
    ($($(#[$about:meta])* $List:ident of $One:ident: $raw:ty;)*) => {
        $(
            $(#[$about])*
            pub struct $List<'a, T: Element> {
                addresses: Vec<$raw>,
                /// The smallest number of elements of any entry.
                elements: usize,
                memory: PhantomData<$One<'a, T>>,
            }

            impl<'a, T: Element> FromIterator<$One<'a, T>> for $List<'a, T> {
                fn from_iter<I: IntoIterator<Item = $One<'a, T>>>(all: I) -> Self {
                    let mut list = Self { addresses: vec![], elements: usize::MAX, memory: PhantomData };
                    for one in all {
                        list.addresses.push(one.address as $raw);
                        list.elements = list.elements.min(one.elements);
                    }
                    list
                }
            }

            impl<T: Element> Size for &$List<'_, T> {
                type Value = ();
                fn size(&self) {}
            }
            impl<T: Element> Argument for &$List<'_, T> {
                fn check(&self, launcher: &str, name: &str, expected: u128) -> Result<()> {
                    check_length(self.addresses.len(), launcher, name, expected)?;
                    check_length(self.elements, launcher, name, 1)
                }
            }
        )*
    };
}
lists! {
    /// Scalars that a kernel reads, each at a separate address. The launch copies the addresses.
    InList of In: *const T::C;
    /// Scalars that a kernel writes, each at a separate address. The launch copies the addresses.
    OutList of Out: *mut T::C;
}

/// Untyped device memory that other code owns, such as a buffer of the kernel checks or of the benchmark.
#[derive(Clone, Copy)]
pub struct Buffer {
    address: usize,
    bytes: usize,
}

impl Buffer {
    /// # Safety
    /// `address` must point to at least `bytes` bytes in the memory of the device whose streams use the buffer, for
    /// as long as the buffer is used.
    pub unsafe fn from_address(address: usize, bytes: usize) -> Self {
        Buffer { address, bytes }
    }

    /// Returns the address of the first byte, in the device's address space.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Returns the length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the buffer as elements of type `T`, for reading.
    pub fn input<T>(&self) -> In<'_, T> {
        let elements = self.bytes / size_of::<T>();
        // SAFETY: the creator of the buffer guaranteed that the memory is valid.
        unsafe { In::from_address(self.address, elements) }
    }

    /// Returns the buffer as elements of type `T`, for writing.
    pub fn output<T>(&self) -> Out<'_, T> {
        let elements = self.bytes / size_of::<T>();
        // SAFETY: the creator of the buffer guaranteed that the memory is valid.
        unsafe { Out::from_address(self.address, elements) }
    }
}

impl<'a, T> Out<'a, T> {
    /// Returns the same memory as an input, for kernels whose output may overwrite their input.
    pub fn as_input(self) -> In<'a, T> {
        In {
            address: self.address,
            elements: self.elements,
            memory: PhantomData,
        }
    }
}

impl Tensor {
    /// Returns the elements for a kernel that reads them.
    ///
    /// # Errors
    /// Returns an error when the tensor holds another type.
    ///
    /// # Panics
    /// Panics when the device does not have enough memory.
    pub fn input<T: Element>(&self) -> Result<In<'_, T>> {
        self.expect_element::<T>()?;
        let address = self.pointer::<T>() as usize;
        // SAFETY: the tensor owns its memory.
        Ok(unsafe {
            In::from_address(
                address,
                self.elements() * self.dtype().size() / size_of::<T>(),
            )
        })
    }

    /// Returns the elements for a kernel that writes them; copies them first if they are shared.
    ///
    /// # Errors
    /// Returns an error when the tensor holds another type.
    ///
    /// # Panics
    /// Panics when the device does not have enough memory.
    pub fn output<T: Element>(&mut self) -> Result<Out<'_, T>> {
        self.expect_element::<T>()?;
        let elements = self.elements() * self.dtype().size() / size_of::<T>();
        let address = self.pointer_mut::<T>() as usize;
        // SAFETY: the tensor owns its memory.
        Ok(unsafe { Out::from_address(address, elements) })
    }

    /// Returns the bytes, including the padding up to the end of the device allocation, for a kernel that reads
    /// complete vectors.
    ///
    /// # Panics
    /// Panics when the device does not have enough memory.
    pub fn padded_input(&self) -> In<'_, u8> {
        let bytes = (self.elements() * self.dtype().size()).next_multiple_of(ALIGNMENT);
        // SAFETY: the tensor owns its memory, and a device's allocations are multiples of the alignment.
        unsafe { In::from_address(self.pointer::<u8>() as usize, bytes) }
    }

    /// Returns the bytes, including the padding up to the end of the device allocation, for a kernel that writes
    /// complete vectors; copies them first if they are shared.
    ///
    /// # Panics
    /// Panics when the device does not have enough memory.
    pub fn padded_output(&mut self) -> Out<'_, u8> {
        let bytes = (self.elements() * self.dtype().size()).next_multiple_of(ALIGNMENT);
        // SAFETY: as in padded_input.
        unsafe { Out::from_address(self.pointer_mut::<u8>() as usize, bytes) }
    }

    fn expect_element<T: Element>(&self) -> Result<()> {
        match T::DTYPE {
            Some(dtype) => self.expect_dtype("kernel", "an argument", dtype),
            None => Ok(()),
        }
    }
}

/// The destination of launches: the launchers of a device, and its stream.
#[derive(Clone, Copy)]
pub struct Stream {
    launchers: &'static Launchers,
    raw: routegrad_stream,
}

impl Stream {
    /// Returns the stream on which a device's tensors are computed.
    ///
    /// # Errors
    /// Returns an error for the CPU, which has no kernels, and when no usable GPU is present.
    pub fn of(device: Device) -> Result<Self> {
        let launchers = device.launchers()?;
        Ok(Stream {
            launchers,
            raw: crate::device::stream(),
        })
    }

    /// Returns the stream of an open GPU, and binds the GPU's context to the calling thread.
    ///
    /// # Errors
    /// Returns an error when the driver refuses.
    #[cfg(feature = "cuda")]
    pub fn of_gpu(gpu: &crate::device::cuda::Gpu, launchers: &'static Launchers) -> Result<Self> {
        let raw = gpu.stream()?.cast();
        Ok(Stream { launchers, raw })
    }

    /// Wraps a stream that other code owns, such as PyTorch's current stream.
    ///
    /// # Safety
    /// `raw` must be a `cudaStream_t` of the GPU whose context is bound to the calling thread, and must be valid for
    /// as long as its launches run.
    pub unsafe fn from_raw(launchers: &'static Launchers, raw: *mut c_void) -> Self {
        Stream { launchers, raw }
    }

    /// Returns the launchers of this stream.
    pub fn launchers(&self) -> &'static Launchers {
        self.launchers
    }

    pub(super) fn raw(&self) -> routegrad_stream {
        self.raw
    }
}

/// The value of a size in formulas of lengths. It is limited to `MOST`, so that the formulas cannot overflow.
pub trait Size {
    /// The type of the value in formulas of lengths; `()` for an argument that is not a size.
    type Value;
    /// Returns the argument as a value in formulas.
    fn size(&self) -> Self::Value;
}

/// More elements than any buffer has; a product of three such values fits in the type.
const MOST: u128 = 1 << 40;

impl Size for usize {
    type Value = u128;
    fn size(&self) -> u128 {
        (*self as u128).min(MOST)
    }
}

macro_rules! no_sizes {
    ($($type:ty),*) => {
        $(impl Size for $type {
            type Value = $type;
            fn size(&self) -> $type {
                *self
            }
        })*
    };
}
no_sizes!(bool, i32, u32, f32, f64);

impl<'a, T> Size for In<'a, T> {
    type Value = ();
    fn size(&self) {}
}
impl<'a, T> Size for Out<'a, T> {
    type Value = ();
    fn size(&self) {}
}
/// The value of an optional argument is whether it is present.
impl<A: Copy> Size for Option<A> {
    type Value = bool;
    fn size(&self) -> bool {
        self.is_some()
    }
}

/// An argument whose length is checked.
pub trait Argument {
    /// # Errors
    /// Returns an error when there are fewer elements than `expected`.
    fn check(&self, launcher: &str, name: &str, expected: u128) -> Result<()>;
}

fn check_length(elements: usize, launcher: &str, name: &str, expected: u128) -> Result<()> {
    if elements as u128 >= expected {
        return Ok(());
    }
    Err(Error::invalid(
        launcher,
        format!("`{name}` of {expected} elements or more"),
        elements.to_string(),
        "pass buffers that match the sizes; nothing was launched",
    ))
}

macro_rules! arguments {
    ($($Name:ident),*) => {
        $(
            impl<T> Argument for $Name<'_, T> {
                fn check(&self, launcher: &str, name: &str, expected: u128) -> Result<()> {
                    check_length(self.elements, launcher, name, expected)
                }
            }
        )*
    };
}
arguments!(In, Out);
impl<A: Argument> Argument for Option<A> {
    fn check(&self, launcher: &str, name: &str, expected: u128) -> Result<()> {
        self.as_ref()
            .map_or(Ok(()), |a| a.check(launcher, name, expected))
    }
}

/// Conversion of an argument to the launcher's C type `Raw`.
pub trait Pass<Raw> {
    /// # Errors
    /// Returns an error when a size does not fit in the launcher's type.
    fn pass(self, launcher: &str, name: &str) -> Result<Raw>;
}

impl<T: Element> Pass<*const T::C> for In<'_, T> {
    fn pass(self, _: &str, _: &str) -> Result<*const T::C> {
        Ok(self.address as *const T::C)
    }
}
impl<T: Element> Pass<*const T::C> for Option<In<'_, T>> {
    fn pass(self, _: &str, _: &str) -> Result<*const T::C> {
        Ok(self.map_or(std::ptr::null(), |a| a.address as *const T::C))
    }
}
impl<T: Element> Pass<*mut T::C> for Out<'_, T> {
    fn pass(self, _: &str, _: &str) -> Result<*mut T::C> {
        Ok(self.address as *mut T::C)
    }
}
impl<T: Element> Pass<*mut T::C> for Option<Out<'_, T>> {
    fn pass(self, _: &str, _: &str) -> Result<*mut T::C> {
        Ok(self.map_or(std::ptr::null_mut(), |a| a.address as *mut T::C))
    }
}

impl<T: Element> Pass<*const *const T::C> for &InList<'_, T> {
    fn pass(self, _: &str, _: &str) -> Result<*const *const T::C> {
        Ok(graph::kept(&self.addresses))
    }
}
impl<T: Element> Pass<*const *mut T::C> for &OutList<'_, T> {
    fn pass(self, _: &str, _: &str) -> Result<*const *mut T::C> {
        Ok(graph::kept(&self.addresses))
    }
}

impl Size for &routegrad_unit_box {
    type Value = ();
    fn size(&self) {}
}
impl Pass<*const routegrad_unit_box> for &routegrad_unit_box {
    fn pass(self, _: &str, _: &str) -> Result<*const routegrad_unit_box> {
        Ok(graph::kept(std::slice::from_ref(self)))
    }
}

macro_rules! sizes {
    ($($c:ty),*) => {
        $(impl Pass<$c> for usize {
            fn pass(self, launcher: &str, name: &str) -> Result<$c> {
                <$c>::try_from(self).map_err(|_| {
                    let most = format!("`{name}` of at most {}", <$c>::MAX);
                    Error::invalid(launcher, most, self.to_string(), "nothing was launched")
                })
            }
        })*
    };
}
sizes!(i32, i64);

/// A constant of a C enumeration.
impl Pass<i32> for u32 {
    fn pass(self, launcher: &str, name: &str) -> Result<i32> {
        (self as usize).pass(launcher, name)
    }
}

macro_rules! values {
    ($($type:ty => $c:ty),*) => {
        $(impl Pass<$c> for $type {
            fn pass(self, _: &str, _: &str) -> Result<$c> {
                Ok(self.into())
            }
        })*
    };
}
values!(bool => i32, i32 => i32, f32 => f32, f64 => f64);
