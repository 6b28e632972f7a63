//! The gradient check passes on the code as it is, and fails when any term of a gradient is missing.

use routegrad::check::{Fault, compare_precisions};
use routegrad::gradcheck;
use routegrad::ops::OPS;

#[test]
fn every_op_router_and_model_agrees_with_finite_differences_to_1e_6() {
    let rows = gradcheck::run("", None, |_| ()).unwrap();
    for subject in [
        "op router",
        "op combine",
        "router default",
        "model topk",
        "model dense",
    ] {
        let own = rows.iter().filter(|r| r.subject == subject);
        assert!(own.map(|r| r.compared).sum::<usize>() > 0, "{subject}");
    }
    for row in rows {
        assert!(row.passes(), "{row:?}");
    }
}

#[test]
fn every_planted_fault_makes_a_layer_and_a_model_fail() {
    for (fault, name) in Fault::ALL {
        let rows = gradcheck::run("default", Some(fault), |_| ()).unwrap();
        for kind in ["router ", "model "] {
            let failed = rows
                .iter()
                .filter(|r| r.subject.starts_with(kind) && !r.passes());
            assert!(failed.count() > 0, "{name} goes unnoticed in {kind}");
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
