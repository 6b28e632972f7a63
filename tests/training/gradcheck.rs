//! The gradient check passes on the code as it is, and fails when any term of a gradient is missing.

use routegrad::ops::OPS;
use routegrad::routers::ROUTERS;
use routegrad::tape::check::compare_precisions;
use routegrad::verify::fault::Fault;
use routegrad::verify::gradcheck;

#[test]
fn every_op_router_and_model_agrees_with_finite_differences_to_1e_6() {
    let rows = gradcheck::run("", None, |_| ()).unwrap();
    let routers = ROUTERS.iter().flat_map(|r| {
        let name = r.name;
        [format!("router {name}"), format!("model {name}")]
    });
    for subject in ["op router".into(), "op combine".into()]
        .into_iter()
        .chain(routers)
    {
        let own = rows.iter().filter(|r| r.subject == subject);
        assert!(own.map(|r| r.compared).sum::<usize>() > 0, "{subject}");
    }
    for row in rows {
        assert!(row.passes(), "{row:?}");
    }
}

#[test]
#[ignore = "slow"]
fn every_planted_fault_makes_a_layer_and_a_model_fail() {
    for (fault, name) in Fault::ALL {
        let router = match fault {
            Fault::SampledOwnTerm => "sparsemixer",
            // A model is checked with all experts chosen; a layer is below.
            Fault::UnchosenGate => continue,
            _ => "default",
        };
        let rows = gradcheck::run(router, Some(fault), |_| ()).unwrap();
        for kind in ["router ", "model "] {
            let failed = rows
                .iter()
                .filter(|r| r.subject.starts_with(kind) && !r.passes());
            assert!(failed.count() > 0, "{name} goes unnoticed in {kind}");
        }
    }
}

#[test]
fn a_fault_that_a_router_has_makes_its_layer_fail() {
    use Fault::*;
    for (router, faults) in [
        ("topk", &[ActiveDot, SoftmaxOwnTerm, AuxiliaryTerm][..]),
        ("densemixer", &[ActiveDot, SoftmaxMeanTerm, UnchosenGate]),
        ("sparsemixer", &[ActiveDot, ExpertOutput, SampledOwnTerm]),
        ("remoe", &[ActiveDot, ExpertOutput, AuxiliaryTerm]),
        ("lossfree", &[ActiveDot, ExpertOutput, SoftmaxOwnTerm]),
    ] {
        for &fault in faults {
            let subject = format!("router {router}");
            let rows = gradcheck::run(&subject, Some(fault), |_| ()).unwrap();
            let failed = rows.iter().filter(|r| !r.passes());
            assert!(failed.count() > 0, "{fault} goes unnoticed in {subject}");
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
