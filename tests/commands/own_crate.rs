//! A crate of its own registers a router, and every command of its program knows it by name.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const MAIN: &str = r#"
use routegrad::ops::routing::{Choice, Score, scores};
use routegrad::prelude::*;

/// As `topk`, under a name of its own.
#[derive(Default)]
struct Own;

impl Router for Own {
    fn route(&self, tape: &Tape, x: &Var, w: &Var, layer: &mut LayerPass) -> Result<Routing> {
        let scores = scores(tape, x, w, Score::Softmax, Choice::top_k(layer.top_k))?;
        Routing::by_scores(scores, layer)
    }
}

fn main() -> std::process::ExitCode {
    if let Err(error) = routers::register(RouterInfo::new::<Own>("own", "a router of another crate")) {
        eprintln!("error: {error}");
        return std::process::ExitCode::FAILURE;
    }
    routegrad::cli::main()
}
"#;

/// The folder of build results that this test is in, and its profile.
fn build_folder() -> (PathBuf, &'static str) {
    let test = std::env::current_exe().unwrap();
    let profile = test.ancestors().nth(2).unwrap();
    let release = profile.file_name().unwrap() == "release";
    let flag = if release { "release" } else { "dev" };
    (profile.parent().unwrap().into(), flag)
}

/// Builds the crate in `folder` with what this test was built with, and gives its program.
fn build(folder: &Path) -> PathBuf {
    let repository = env!("CARGO_MANIFEST_DIR");
    let features: &[&str] = &[
        #[cfg(feature = "text")]
        "\"text\"",
        #[cfg(feature = "cuda")]
        "\"cuda\"",
    ];
    // With the same profiles the dependencies are those that are built already.
    let own = fs::read_to_string(Path::new(repository).join("Cargo.toml")).unwrap();
    let sections = own.split("\n[").filter(|s| s.starts_with("profile."));
    let mut profiles: String = sections.map(|s| format!("\n[{s}")).collect();
    // Here routegrad is a dependency, which has no debug information unless it is named.
    profiles += "\n[profile.release.package.routegrad]\ndebug = \"line-tables-only\"\n";
    let manifest = format!(
        "[package]\nname = \"own-router-crate\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n\
         [dependencies]\nroutegrad = {{ path = \"{repository}\", features = [{}] }}\n\n[workspace]\n{profiles}",
        features.join(", ")
    );
    fs::create_dir(folder.join("src")).unwrap();
    fs::write(folder.join("Cargo.toml"), manifest).unwrap();
    fs::write(folder.join("src/main.rs"), MAIN).unwrap();
    fs::copy(
        Path::new(repository).join("Cargo.lock"),
        folder.join("Cargo.lock"),
    )
    .unwrap();
    let (target, profile) = build_folder();
    let cargo = Command::new(env!("CARGO"))
        .args(["build", "--offline", "--profile", profile])
        .env("CARGO_TARGET_DIR", &target)
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(
        cargo.status.success(),
        "{}",
        String::from_utf8_lossy(&cargo.stderr)
    );
    let built = if profile == "dev" { "debug" } else { profile };
    target.join(built).join("own-router-crate")
}

fn succeed(program: &Path, arguments: &[&str]) -> String {
    let done = Command::new(program).args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(done.stdout).unwrap()
}

#[test]
fn a_router_of_another_crate_trains_and_resumes_by_name() {
    let place = tempfile::tempdir().unwrap();
    let program = build(place.path());
    let list = succeed(&program, &["routers"]);
    assert!(
        list.contains("own\n    a router of another crate"),
        "{list}"
    );

    let folder = |name: &str| place.path().join(name).to_string_lossy().into_owned();
    let train = |out: &str, router: &str, steps: &str| {
        let small = [
            "model.layers=2",
            "model.sequence_length=32",
            "train.sequences_per_step=4",
            "train.micro_batch=2",
        ];
        let set = small.iter().flat_map(|key| ["--set", key]);
        let fixed = [
            "train", "--quiet", "--router", router, "--steps", steps, "--out", out,
        ];
        succeed(&program, &fixed.into_iter().chain(set).collect::<Vec<_>>());
    };
    let (whole, topk) = (folder("whole"), folder("topk"));
    train(&whole, "own", "4");
    train(&topk, "topk", "4");
    let model = |out: &str| {
        let checkpoint = Path::new(out).join("checkpoints/step-4");
        fs::read(checkpoint.join("model.safetensors")).unwrap()
    };
    // The same mathematics under another name.
    assert!(model(&whole) == model(&topk));
    let config = fs::read_to_string(Path::new(&whole).join("config.toml")).unwrap();
    assert!(config.contains("name = \"own\""), "{config}");

    // From its checkpoint, which names the router: two more steps.
    succeed(
        &program,
        &[
            "train", "--quiet", "--resume", "--out", &whole, "--steps", "6",
        ],
    );
    let log = fs::read_to_string(Path::new(&whole).join("metrics.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 6);
    let evaluated = succeed(&program, &["eval", "--model", &whole, "--sequences", "4"]);
    assert!(evaluated.contains("validation loss"), "{evaluated}");
    // The program without it says which routers it has.
    let without = Command::new(env!("CARGO_BIN_EXE_routegrad"))
        .args(["eval", "--model", &whole, "--sequences", "4"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&without.stderr);
    assert!(
        !without.status.success() && stderr.contains("\"own\""),
        "{stderr}"
    );
}
