//! The plan of a run against the run.
use crate::common::{fail, program, succeed};
use std::fs;
use std::time::{Duration, Instant};

/// The most memory that three steps take, in bytes, as the kernel counts it.
fn measured(out: &std::path::Path, sets: &[&str]) -> f64 {
    let mut command = program();
    command.args([
        "train",
        "--no-checkpoint",
        "--quiet",
        "--steps",
        "3",
        "--out",
    ]);
    command
        .arg(out)
        .args(["--set", "train.eval_sequences=16"])
        .args(sets);
    let mut child = command.spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0.0;
    loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
        peak = kilobytes.map_or(peak, |k| 1024.0 * k);
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            return peak;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
#[ignore = "slow"]
fn planned_memory_is_within_a_tenth_of_the_measured() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [&[&str]; 5] = [
        &["--preset", "tiny", "--router", "default"],
        &[
            "--preset",
            "tiny",
            "--router",
            "default",
            "--set",
            "train.recompute=true",
        ],
        &[
            "--preset",
            "tiny",
            "--router",
            "dense",
            "--set",
            "train.recompute=true",
        ],
        &["--preset", "small", "--router", "topk"],
        &[
            "--preset",
            "small",
            "--router",
            "topk",
            "--set",
            "train.recompute=true",
        ],
    ];
    for (i, case) in cases.iter().enumerate() {
        let measured = measured(&folder.path().join(i.to_string()), case);
        let (json, _) = succeed(program().args(["plan", "--json"]).args(*case));
        let plan: serde_json::Value = serde_json::from_str(&json).unwrap();
        let memory = plan["memory"].as_object().unwrap();
        let planned: f64 = memory.values().map(|v| v.as_f64().unwrap()).sum();
        let ratio = planned / measured;
        eprintln!(
            "{case:?}: planned / measured = {ratio:.3} of {:.0} MB",
            measured / 1e6
        );
        assert!((ratio - 1.0).abs() <= 0.1, "{case:?}: {ratio:.3}");
    }
}

#[test]
fn a_plan_reads_the_text_and_the_recorded_speed_of_the_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let plan = |data: &str, records: &str| {
        let mut command = program();
        command.args(["plan", "--preset", "557m", "--device", "h200", "--data"]);
        command
            .arg(place(data))
            .arg("--records")
            .arg(place(records));
        command
    };
    assert!(fail(&mut plan("missing.txt", "none")).contains("missing.txt"));
    let document = "word ".repeat(2000);
    fs::write(place("text.txt"), vec![document; 20].join("\n\n\n")).unwrap();
    let (text, _) = succeed(&mut plan("text.txt", "none"));
    assert!(text.contains("tokens, read"), "{text}");
    assert!(text.contains("upper bound: 490583 tokens/s"), "{text}");
    // The same text as a key, and one that another machine has.
    for (name, read) in [("text.txt", true), ("missing.txt", false)] {
        let key = format!("data.source=\"{}\"", place(name).display());
        let (text, _) = succeed(program().args(["plan", "--preset", "557m", "--set", &key]));
        assert_eq!(text.contains("tokens, read"), read, "{text}");
    }
    fs::create_dir(place("records")).unwrap();
    let record = serde_json::json!({
        "gpu": "NVIDIA H200", "task": "trains: 557m default", "code": "", "ending": "passed", "detail": "",
        "measured": {"tflops": 247.25, "flops_per_step": 1e15, "tokens_per_step": 1e6},
        "date": "2026-11-24T14:01:14Z", "commit": "", "driver": "", "system": "", "seconds": 1.0,
        "before": null, "after": null,
    });
    fs::write(
        place("records/hardware-nvidia-h200.jsonl"),
        format!("{record}\n"),
    )
    .unwrap();
    let (text, _) = succeed(&mut plan("text.txt", "records"));
    assert!(
        text.contains("about 245291 tokens/s") && text.contains("as 557m default"),
        "{text}"
    );
    assert!(!text.contains("upper bound"), "{text}");
}

#[test]
fn the_largest_model_is_planned_in_under_a_second() {
    let begun = Instant::now();
    let wide = ["--set", "train.micro_batch=64"];
    let large = ["plan", "--preset", "7.33b", "--device", "h200"];
    let (text, _) = succeed(program().args(large).args(wide));
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert!(
        text.contains("7.330 G") && text.contains("does not fit"),
        "{text}"
    );
}
