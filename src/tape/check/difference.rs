//! Comparison of gradients with central differences, and of one precision with another.

use super::{Case, normal_numbers};
use crate::error::{Error, Result};
use crate::tape::{Gradients, Tape, Var};
use crate::tensor::Tensor;
use crate::tensor::dtype::Real;

/// Inputs of at most this many elements are checked element by element.
const ALL_ELEMENTS: usize = 48;
/// Number of elements checked of a larger input, evenly spaced.
const SAMPLED_ELEMENTS: usize = 24;
/// Number of random directions along which a larger input is also checked; these involve every element.
const DIRECTIONS: usize = 3;

/// The deviation of one input's gradient from the differences.
#[derive(Clone, Debug)]
pub struct GradientReport {
    /// Name of the [`Case`].
    pub case: String,
    /// Name of the [`Input`](super::Input).
    pub input: String,
    /// Number of derivatives compared: elements and directions.
    pub compared: usize,
    /// max |difference − gradient| / max |difference|, the larger of the values for elements and for directions.
    pub relative_error: f64,
}

/// Checks every differentiable input of a case in f64: the gradient of `Σ ⟨g, output⟩`, g random,
/// against the five-point central difference, whose error is of order h⁴.
///
/// # Errors
/// The errors of the operation.
pub fn finite_differences(case: &Case) -> Result<Vec<GradientReport>> {
    let variables = case.variables::<f64>();
    let (seeds, store) = differentiate(case, &variables)?;
    let objective = |inputs: &[Var]| -> Result<f64> {
        let outputs = case.run(&Tape::without_gradients(), inputs)?;
        let dot = |(v, g): (&Var, &Tensor)| -> f64 {
            v.tensor()
                .slice::<f64>()
                .iter()
                .zip(g.slice::<f64>())
                .map(|(a, b)| a * b)
                .sum()
        };
        Ok(outputs.iter().zip(&seeds).map(dot).sum())
    };
    let mut reports = Vec::new();
    for (i, input) in case
        .inputs
        .iter()
        .enumerate()
        .filter(|(_, input)| input.differentiable)
    {
        let n = input.tensor.elements();
        let zeros = vec![0.0; n];
        let gradient = store.get(i).map_or(zeros.as_slice(), |t| t.slice::<f64>());
        let along = |direction: &dyn Fn(usize) -> f64| -> Result<f64> {
            let mut inputs: Vec<Var> = variables.iter().map(Var::detached).collect();
            central_difference(|h| {
                let moved: Vec<f64> = (0..n)
                    .map(|e| input.tensor.slice::<f64>()[e] + h * direction(e))
                    .collect();
                inputs[i] = Var::constant(Tensor::from_slice(input.tensor.shape(), &moved));
                objective(&inputs)
            })
        };
        let elements: Vec<usize> = if n <= ALL_ELEMENTS {
            (0..n).collect()
        } else {
            (0..SAMPLED_ELEMENTS)
                .map(|k| k * n / SAMPLED_ELEMENTS)
                .collect()
        };
        let mut pairs = Vec::new();
        for &e in &elements {
            pairs.push((along(&|k| if k == e { 1.0 } else { 0.0 })?, gradient[e]));
        }
        let mut error = relative_error(&pairs);
        let mut compared = pairs.len();
        if n > ALL_ELEMENTS {
            pairs.clear();
            for k in 0..DIRECTIONS {
                let mut direction = normal_numbers(n, 2000 + k as u64);
                let length = direction.iter().map(|x| x * x).sum::<f64>().sqrt();
                direction.iter_mut().for_each(|x| *x /= length);
                let expected: f64 = direction.iter().zip(gradient).map(|(a, b)| a * b).sum();
                pairs.push((along(&|e| direction[e])?, expected));
            }
            compared += pairs.len();
            error = larger(error, relative_error(&pairs));
        }
        reports.push(GradientReport {
            case: case.name.clone(),
            input: input.name.clone(),
            compared,
            relative_error: error,
        });
    }
    Ok(reports)
}

/// Returns the gradient of every differentiable input in f64, with the input's name. The incoming gradients depend
/// only on the shapes of the outputs.
///
/// # Errors
/// The errors of the operation.
pub fn gradients(case: &Case) -> Result<Vec<(String, Vec<f64>)>> {
    let (_, store) = differentiate(case, &case.variables::<f64>())?;
    let inputs = case
        .inputs
        .iter()
        .enumerate()
        .filter(|(_, input)| input.differentiable);
    inputs
        .map(|(i, input)| {
            let gradient = match store.get(i) {
                Some(t) => t.to_f64()?,
                None => vec![0.0; input.tensor.elements()],
            };
            Ok((input.name.clone(), gradient))
        })
        .collect()
}

/// Runs forward and backward. Returns the random incoming gradients, and the gradients of the leaves.
fn differentiate(case: &Case, variables: &[Var]) -> Result<(Vec<Tensor>, Gradients)> {
    let tape = Tape::new();
    let outputs = case.run(&tape, variables)?;
    let seeds: Vec<Tensor> = outputs
        .iter()
        .enumerate()
        .map(|(i, v)| {
            let shape = v.tensor().shape();
            Tensor::from_slice(shape, &normal_numbers(shape.elements(), 1000 + i as u64))
        })
        .collect();
    let pairs: Vec<(&Var, Tensor)> = outputs.iter().zip(seeds.iter().cloned()).collect();
    let mut store = Gradients::new(variables.len());
    tape.backward_from(&pairs, &mut store)?;
    Ok((seeds, store))
}

/// f′(0) ≈ (8 (f(h) − f(−h)) − (f(2h) − f(−2h))) / 12h. With h = 1e-3 both the truncation, h⁴ f⁗′/30,
/// and the rounding, 1e-16 f / h, stay near 1e-13.
fn central_difference(mut f: impl FnMut(f64) -> Result<f64>) -> Result<f64> {
    const H: f64 = 1e-3;
    let near = f(H)? - f(-H)?;
    let far = f(2.0 * H)? - f(-2.0 * H)?;
    Ok((8.0 * near - far) / (12.0 * H))
}

/// Returns max |a − b| / max |a| over the pairs (a, b); 0 if all numbers are 0.
fn relative_error(pairs: &[(f64, f64)]) -> f64 {
    let scale = pairs
        .iter()
        .fold(0.0, |m, (a, b)| larger(m, larger(a.abs(), b.abs())));
    let worst = pairs.iter().fold(0.0, |m, (a, b)| larger(m, (a - b).abs()));
    if scale == 0.0 { 0.0 } else { worst / scale }
}

/// Returns the larger of two numbers; NaN if either is NaN.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// Runs a case forward and backward in f32 and in f64 and returns the largest relative L2 distance over outputs and
/// gradients, with the name of that tensor.
///
/// # Errors
/// The errors of the operation.
pub fn compare_precisions(case: &Case) -> Result<(String, f64)> {
    let rough = results::<f32>(case)?;
    let exact = results::<f64>(case)?;
    let mut worst = (String::new(), 0.0);
    for ((name, a), (_, b)) in rough.into_iter().zip(exact) {
        let square = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
        let distance = square(&mut a.iter().zip(&b).map(|(x, y)| x - y));
        let error = distance / square(&mut b.iter().copied()).max(f64::MIN_POSITIVE);
        if !(error <= worst.1) {
            worst = (name, error);
        }
    }
    Ok(worst)
}

/// Returns every output and gradient of a case that is run in type `T`.
fn results<T: Real>(case: &Case) -> Result<Vec<(String, Vec<f64>)>> {
    let variables = case.variables::<T>();
    let mut store = Gradients::new(variables.len());
    let tape = Tape::new();
    let outputs = case.run(&tape, &variables)?;
    let mut found = Vec::new();
    let mut pairs = Vec::new();
    for (i, v) in outputs.iter().enumerate() {
        let tensor = v.tensor();
        if tensor.dtype() != T::DTYPE {
            return Err(Error::invalid(
                &case.name,
                format!("outputs of dtype {}", T::DTYPE),
                tensor.dtype().to_string(),
                "this is a bug of the operation",
            ));
        }
        let seed: Vec<T> = normal_numbers(tensor.elements(), 1000 + i as u64)
            .into_iter()
            .map(T::of)
            .collect();
        pairs.push((v, Tensor::from_slice(tensor.shape(), &seed)));
        found.push((format!("output {i}"), tensor.to_f64()?));
    }
    tape.backward_from(&pairs, &mut store)?;
    for (i, input) in case
        .inputs
        .iter()
        .enumerate()
        .filter(|(_, input)| input.differentiable)
    {
        let gradient = match store.get(i) {
            Some(t) => t.to_f64()?,
            None => vec![0.0; input.tensor.elements()],
        };
        found.push((format!("gradient of {}", input.name), gradient));
    }
    Ok(found)
}
