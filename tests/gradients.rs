//! Every operation's gradients against finite differences, and f32 against f64.

use routegrad::check::{compare_precisions, finite_differences};
use routegrad::ops::OPS;

#[test]
fn every_gradient_agrees_with_finite_differences_to_1e_6() {
    for op in OPS {
        for case in (op.cases)() {
            for report in finite_differences(&case).unwrap() {
                assert!(report.relative_error <= 1e-6, "{report:?}");
            }
        }
    }
}

#[test]
fn f32_agrees_with_f64() {
    for op in OPS {
        for case in (op.cases)() {
            let (tensor, error) = compare_precisions(&case).unwrap();
            assert!(error <= 2e-5, "{}: {tensor} is off by {error}", case.name);
        }
    }
}
