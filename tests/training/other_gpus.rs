//! `train --sim-arch`: whole runs with the kernels for GPUs without TMA and wgmma.

use crate::common::{Place, fail, metrics, succeed};

/// Three steps of the micro model on `device`, in heads that have kernels. Sequences of more than a tile of keys of either
/// kind of kernels: there attention adds in another order than on Hopper.
fn run(place: &Place, out: &str, device: &[&str]) -> Vec<f64> {
    let model = [
        "model.sequence_length=192",
        "model.head_dim=64",
        "model.dense_ffn_width=48",
        "train.checkpoint_interval=3",
    ];
    let set = model.iter().flat_map(|key| ["--set", key]);
    let set = set.chain(["--steps", "3"]).chain(device.iter().copied());
    let arguments: Vec<&str> = set.collect();
    succeed(&mut place.train(out, &arguments));
    let losses = metrics(&place.path(out)).into_iter();
    losses.map(|step| step["loss"].as_f64().unwrap()).collect()
}

fn weights(place: &Place, out: &str) -> Vec<u8> {
    let file = format!("{out}/checkpoints/step-3/model.safetensors");
    std::fs::read(place.path(&file)).unwrap()
}

#[test]
fn a_run_as_on_an_ampere_gpu_takes_its_kernels_and_gives_the_losses_of_the_cpu_and_of_hopper() {
    let place = Place::new();
    let cpu = run(&place, "cpu", &["--device", "cpu"]);
    let hopper = run(&place, "hopper", &["--device", "sim"]);
    let on = |arch| run(&place, arch, &["--device", "sim", "--sim-arch", arch]);
    let ampere = on("sm_80");
    println!("cpu {cpu:?}, sm_90 {hopper:?}, sm_80 {ampere:?}");
    assert_eq!(ampere.len(), 3);
    for (step, loss) in ampere.iter().enumerate() {
        // Of a CPU in f32; the kernels have bf16 weights and activations.
        assert!((loss / cpu[step] - 1.0).abs() <= 0.01, "step {step}");
        assert!((loss / hopper[step] - 1.0).abs() <= 1e-3, "step {step}");
    }
    // The architecture reached the kernels: those of Hopper give other bytes. The tiles that 99 KB of shared memory allow give
    // the bytes of those that 163 KB allow.
    assert!(weights(&place, "sm_80") != weights(&place, "hopper"));
    assert_eq!(on("sm_86"), ampere);
    assert!(weights(&place, "sm_86") == weights(&place, "sm_80"));
}

#[test]
fn an_architecture_is_refused_where_nothing_simulates_it() {
    let place = Place::new();
    for device in [&[][..], &["--device", "cpu"]] {
        let arguments = [device, &["--sim-arch", "sm_80"]].concat();
        let error = fail(&mut place.train("refused", &arguments));
        assert!(error.contains("add --device sim"), "{error}");
        assert!(!place.path("refused").exists());
    }
}
