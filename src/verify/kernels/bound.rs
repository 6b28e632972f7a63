//! The arguments of launches: the buffers of a problem, which a launch finds by the names of its fields.

use crate::kernels::Buffer;
use crate::kernels::argument::{In, Out};
use std::ops::Deref;

/// The buffers of a problem on a machine, in its order, with their names.
pub struct Bound {
    /// A name for each buffer.
    pub names: Vec<&'static str>,
    /// The buffers.
    pub buffers: Vec<Buffer>,
}

impl Deref for Bound {
    type Target = [Buffer];
    fn deref(&self) -> &[Buffer] {
        &self.buffers
    }
}

impl Bound {
    /// Returns the buffers of this name.
    pub fn all(&self, name: &str) -> impl Iterator<Item = &Buffer> {
        let named = self.names.iter().zip(&self.buffers);
        named
            .filter(move |(n, _)| **n == name)
            .map(|(_, buffer)| buffer)
    }

    /// Returns the only buffer of this name.
    ///
    /// # Panics
    /// When there is none, or more than one.
    pub fn named(&self, name: &str) -> &Buffer {
        self.only(name).unwrap_or_else(|why| panic!("{why}"))
    }

    /// Returns the buffer of this name for a field of a kernel.
    ///
    /// # Panics
    /// When there is none, or more than one: a bug of the case.
    pub fn field<'a, F: Field<'a>>(&'a self, kernel: &str, field: &str, name: &str) -> F {
        let buffer = self.only(name);
        F::of(buffer.unwrap_or_else(|why| panic!("{kernel}, field `{field}`: {why}")))
    }

    fn only(&self, name: &str) -> Result<&Buffer, String> {
        let mut found = self.all(name);
        match (found.next(), found.next()) {
            (Some(buffer), None) => Ok(buffer),
            (None, _) => Err(format!(
                "no buffer is named `{name}`, only {:?}",
                self.names
            )),
            _ => Err(format!("more than one buffer is named `{name}`")),
        }
    }
}

/// A field of a kernel's struct that is a buffer.
pub trait Field<'a> {
    /// Returns the buffer as an argument.
    fn of(buffer: &'a Buffer) -> Self;
}
impl<'a, T> Field<'a> for In<'a, T> {
    fn of(buffer: &'a Buffer) -> Self {
        buffer.input()
    }
}
impl<'a, T> Field<'a> for Out<'a, T> {
    fn of(buffer: &'a Buffer) -> Self {
        buffer.output()
    }
}
impl<'a, F: Field<'a>> Field<'a> for Option<F> {
    fn of(buffer: &'a Buffer) -> Self {
        Some(F::of(buffer))
    }
}

/// A kernel's struct: `bind!(buffers, Kernel { fields that are buffers; other fields })`.
///
/// `y` is the buffer named `y`, `x = "a"` the one named `a`. An optional field is given `if` a condition holds.
macro_rules! bind {
    (@given; $field:expr) => { $field };
    (@given $given:expr; $field:expr) => { ($given).then(|| $field) };
    (@name $field:ident) => { stringify!($field) };
    (@name $field:ident ($name:expr)) => { $name };
    (@name $field:ident $name:tt) => { $name };
    ($p:ident, $Kernel:ident {
        $($field:ident $(= $name:tt)? $(if $given:expr)?),*;
        $($other:tt)*
    }) => {
        $Kernel {
            $(
                $field: $crate::verify::kernels::bound::bind!(@given $($given)?; $p.field(
                    stringify!($Kernel),
                    stringify!($field),
                    $crate::verify::kernels::bound::bind!(@name $field $($name)?),
                )),
            )*
            $($other)*
        }
    };
}
pub(crate) use bind;

/// The launch of kernels one after another, whose arguments are as in [`bind`].
macro_rules! launch_of {
    ($($Kernel:ident $fields:tt),+) => {
        Box::new(move |p, stream| {
            $( $crate::verify::kernels::bound::bind!(p, $Kernel $fields).launch(stream)?; )+
            Ok(())
        })
    };
}
pub(crate) use launch_of;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::argument::Pass;
    use crate::kernels::{SumParts, SwigluForward};
    use std::ffi::c_void;

    fn bound(names: &[&'static str]) -> Bound {
        // SAFETY: nothing reads the empty buffers.
        let buffer = |i: usize| unsafe { Buffer::from_address(128 * (i + 1), 0) };
        Bound {
            names: names.to_vec(),
            buffers: (0..names.len()).map(buffer).collect(),
        }
    }

    #[test]
    fn a_field_is_the_buffer_of_its_name() {
        let p = &bound(&["h", "a"]);
        let named = bind!(p, SwigluForward { a, h; rows: 4, ffn: 8 });
        let other = bind!(p, SwigluForward { a = "h", h; rows: 4, ffn: 8 });
        for (kernel, address) in [(named, 256), (other, 128)] {
            let a: *mut c_void = kernel.a.pass("", "").unwrap();
            let h: *const c_void = kernel.h.pass("", "").unwrap();
            assert_eq!((a as usize, h as usize), (address, 128));
        }
    }

    #[test]
    #[should_panic(
        expected = "SumParts, field `parts`: no buffer is named `parts`, only [\"out\"]"
    )]
    fn a_field_without_a_buffer_is_named() {
        let p = &bound(&["out"]);
        bind!(p, SumParts { out, parts; count: 1, elements: 8, accumulate: false });
    }

    #[test]
    #[should_panic(expected = "more than one buffer is named `out`")]
    fn a_name_of_two_buffers_is_refused() {
        bound(&["out", "out"]).named("out");
    }
}
