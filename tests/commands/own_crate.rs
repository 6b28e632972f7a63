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

/// Compiles the crate in `folder` against the library that was built for this test, and gives its program. By Cargo the library
/// would be another one, of another workspace, and be compiled once more: minutes.
fn build(folder: &Path) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let libraries = test.parent().unwrap();
    let changed = |path: &PathBuf| fs::metadata(path).unwrap().modified().unwrap();
    let found = fs::read_dir(libraries)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.starts_with("libroutegrad-") && name.ends_with(".rlib")
        });
    let library = found.max_by_key(changed).expect("a library of this build");
    let (source, program) = (folder.join("main.rs"), folder.join("own-router"));
    fs::write(&source, MAIN).unwrap();
    let mut compiler = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()));
    compiler.args(["--edition", "2024", "--crate-name", "own_router"]);
    compiler
        .arg("-L")
        .arg(format!("dependency={}", libraries.display()));
    compiler
        .arg("--extern")
        .arg(format!("routegrad={}", library.display()));
    let done = compiler
        .arg(&source)
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{compiler:?}: {stderr}");
    program
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
