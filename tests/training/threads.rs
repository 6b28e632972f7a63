//! Results do not depend on the number of threads.

use routegrad::ops::OPS;
use routegrad::tape::check::{Case, normal_numbers};
use routegrad::tape::{Gradients, Tape, Var};
use routegrad::tensor::Tensor;

/// The bytes of every output and gradient of case `index` of an operation in f32, computed by
/// `threads` threads.
fn bytes(cases: fn() -> Vec<Case>, index: usize, threads: usize) -> Vec<Vec<u8>> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap();
    pool.install(|| {
        let case = &cases()[index];
        let variables = case.variables::<f32>();
        let tape = Tape::new();
        let outputs = case.run(&tape, &variables).unwrap();
        let mut found: Vec<Vec<u8>> = vec![];
        let mut pairs: Vec<(&Var, Tensor)> = vec![];
        for output in &outputs {
            let shape = output.tensor().shape();
            let dout = normal_numbers(shape.elements(), 7);
            let dout: Vec<f32> = dout.into_iter().map(|x| x as f32).collect();
            pairs.push((output, Tensor::from_slice(shape, &dout)));
            found.push(output.tensor().bytes().to_vec());
        }
        let mut store = Gradients::new(variables.len());
        tape.backward_from(&pairs, &mut store).unwrap();
        found.extend((0..variables.len()).filter_map(|i| Some(store.get(i)?.bytes().to_vec())));
        found
    })
}

#[test]
fn one_two_and_four_threads_give_the_same_bytes() {
    for op in OPS {
        for (index, case) in (op.cases)().iter().enumerate() {
            let one = bytes(op.cases, index, 1);
            for threads in [2, 4] {
                assert!(
                    one == bytes(op.cases, index, threads),
                    "{} differs",
                    case.name
                );
            }
        }
    }
}
