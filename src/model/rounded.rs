//! Conversion of initial values, which are drawn in f64, to the model's dtype.

use crate::error::Result;
use crate::tensor::Tensor;
use crate::tensor::dtype::{DType, Real};
use crate::with_real;

/// Returns an f64 tensor converted to another real dtype.
pub fn rounded(t: &Tensor, dtype: DType) -> Result<Tensor> {
    let mut out = Tensor::unspecified(t.device(), dtype, t.shape());
    with_real!(dtype, "model", |T| {
        for (o, &x) in out.slice_mut::<T>().iter_mut().zip(t.slice::<f64>()) {
            *o = T::of(x);
        }
        Ok(out)
    })
}
