//! Verification: each declared case is checked against finite differences and compared between precisions.
//!
//! A [`Case`] has the inputs of an operation and runs it. [`finite_differences`] compares its gradients with central
//! differences in f64. [`compare_precisions`] compares its f32 results with f64 results.

mod difference;

pub use difference::{GradientReport, compare_precisions, finite_differences, gradients};

use crate::error::Result;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::dtype::Real;
use crate::tensor::shape::Shape;

/// A function that runs the operation of a case on its inputs, in order.
type Run = Box<dyn Fn(&Tape, &[Var]) -> Result<Vec<Var>>>;

/// One input of a case.
pub struct Input {
    /// Name in reports.
    pub name: String,
    /// Values, in f64; a check converts them to the dtype it runs in.
    pub tensor: Tensor,
    /// Whether its gradient is checked.
    pub differentiable: bool,
}

/// An operation with given inputs, which the checks run.
pub struct Case {
    /// Operation and shapes, for reports.
    pub name: String,
    /// The inputs, in the order of the arguments of `run`.
    pub inputs: Vec<Input>,
    run: Run,
}

impl Case {
    /// Creates a case without inputs. Add them with [`input`](Self::input), in the order in which `run` reads them.
    pub fn new(
        name: impl Into<String>,
        run: impl Fn(&Tape, &[Var]) -> Result<Vec<Var>> + 'static,
    ) -> Self {
        Case {
            name: name.into(),
            inputs: Vec::new(),
            run: Box::new(run),
        }
    }

    /// Adds an input of standard normal numbers.
    pub fn input(self, name: impl Into<String>, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        let seed = self.inputs.len() as u64 + 1;
        self.values(name, shape, &normal_numbers(shape.elements(), seed))
    }

    /// Adds an input with the given values.
    pub fn values(
        mut self,
        name: impl Into<String>,
        shape: impl Into<Shape>,
        values: &[f64],
    ) -> Self {
        let name = name.into();
        let tensor = Tensor::from_slice(shape, values);
        self.inputs.push(Input {
            name,
            tensor,
            differentiable: true,
        });
        self
    }

    /// Marks the last added input as one without a gradient.
    pub fn constant(mut self) -> Self {
        if let Some(input) = self.inputs.last_mut() {
            input.differentiable = false;
        }
        self
    }

    /// Runs the operation on `inputs` instead of the case's inputs.
    ///
    /// # Errors
    /// The errors of the operation.
    pub fn run(&self, tape: &Tape, inputs: &[Var]) -> Result<Vec<Var>> {
        (self.run)(tape, inputs)
    }

    /// Returns the inputs as variables of type `T`. Differentiable inputs are leaves.
    pub fn variables<T: Real>(&self) -> Vec<Var> {
        self.inputs
            .iter()
            .enumerate()
            .map(|(i, input)| {
                let values: Vec<T> = input
                    .tensor
                    .slice::<f64>()
                    .iter()
                    .map(|&x| T::of(x))
                    .collect();
                let tensor = Tensor::from_slice(input.tensor.shape(), &values);
                if input.differentiable {
                    Var::leaf(tensor, i)
                } else {
                    Var::constant(tensor)
                }
            })
            .collect()
    }
}

/// Returns `n` standard normal numbers, a pure function of seed and position.
pub fn normal_numbers(n: usize, seed: u64) -> Vec<f64> {
    let stream =
        crate::tensor::random::Stream::new(seed, crate::tensor::random::Purpose::Check, 0, 0);
    (0..n as u64).map(|i| stream.normal(i)).collect()
}
