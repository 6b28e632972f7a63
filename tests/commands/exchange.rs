//! Models of transformers: the same numbers to nine digits, from whatever its files look like; and
//! files that are not what they should be.

use crate::common::{Place, fail, program, succeed};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const TYPES: [&str; 4] = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/transformers")
        .join(name)
}

/// Tensors of f64 or bf16, with their shapes, of a file.
fn numbers(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f64>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let found = file.iter().filter_map(|(name, view)| {
        let data = view.data();
        let values: Vec<f64> = match view.dtype() {
            Dtype::F64 => data
                .chunks(8)
                .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
                .collect(),
            Dtype::F32 => data
                .chunks(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()).into())
                .collect(),
            Dtype::BF16 => data
                .chunks(2)
                .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16).into())
                .collect(),
            _ => return None,
        };
        Some((name.to_string(), (view.shape().to_vec(), values)))
    });
    found.collect()
}

/// `dump` of a model on the tokens of a fixture.
fn dump(model: &Path, tokens: &Path, out: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f64>)> {
    let mut command = program();
    command
        .args(["dump", "--model"])
        .arg(model)
        .arg("--tokens")
        .arg(tokens);
    succeed(command.arg("--out").arg(out));
    numbers(out)
}

/// The largest difference of any tensor, as a share of its largest entry; every one is there.
fn worst(ours: &BTreeMap<String, (Vec<usize>, Vec<f64>)>, theirs: &Path) -> f64 {
    let theirs = numbers(theirs);
    assert!(
        theirs.keys().eq(ours.keys()),
        "{:?} {:?}",
        theirs.keys(),
        ours.keys()
    );
    let mut worst: f64 = 0.0;
    for (name, (shape, expected)) in &theirs {
        assert_eq!(&ours[name].0, shape, "{name}");
        let largest = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
        assert!(largest > 0.0, "{name} is all zeros");
        for (a, b) in ours[name].1.iter().zip(expected) {
            worst = worst.max((a - b).abs() / largest);
        }
    }
    worst
}

#[test]
fn logits_loss_and_every_gradient_are_those_of_transformers() {
    let place = Place::new();
    for name in TYPES {
        let expected = fixture(name).join("expected.safetensors");
        let ours = dump(&fixture(name), &expected, &place.path("ours.safetensors"));
        let worst = worst(&ours, &expected);
        eprintln!("{name}: {} arrays, worst {worst:.1e}", ours.len());
        assert!(worst <= 1e-9, "{name}: {worst:e}");
    }
}

/// A copy of a fixture, its config changed.
fn copy(
    place: &Place,
    name: &str,
    change: impl FnOnce(&mut serde_json::Map<String, Value>),
) -> PathBuf {
    let folder = place.path(&format!("{name}-copy"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder).unwrap();
    for file in fs::read_dir(fixture(name)).unwrap() {
        let path = file.unwrap().path();
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let config = folder.join("config.json");
    let mut value: Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    change(value.as_object_mut().unwrap());
    fs::write(&config, value.to_string()).unwrap();
    folder
}

/// Replaces a model's only file by these tensors, in f64.
fn rewrite(folder: &Path, tensors: &BTreeMap<String, (Vec<usize>, Vec<f64>)>) {
    let bytes: BTreeMap<&String, Vec<u8>> = tensors
        .iter()
        .map(|(n, (_, v))| (n, v.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let views = tensors.iter().map(|(name, (shape, _))| {
        let view = TensorView::new(Dtype::F64, shape.clone(), &bytes[name]).unwrap();
        (name.as_str(), view)
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

#[test]
fn fused_experts_and_rope_of_the_old_style_read_as_the_new() {
    let place = Place::new();
    let name = "qwen2_moe";
    let folder = copy(&place, name, |config| {
        let rope = config.remove("rope_parameters").unwrap();
        config.insert("rope_theta".into(), rope["rope_theta"].clone());
    });
    let mut tensors = numbers(&folder.join("model.safetensors"));
    for layer in 0..2 {
        let prefix = format!("model.layers.{layer}.mlp.experts");
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for expert in 0..4 {
            let mut take = |m| {
                tensors
                    .remove(&format!("{prefix}.{expert}.{m}.weight"))
                    .unwrap()
                    .1
            };
            gate_up.extend(take("gate_proj"));
            gate_up.extend(take("up_proj"));
            down.extend(take("down_proj"));
        }
        tensors.insert(format!("{prefix}.gate_up_proj"), (vec![4, 24, 16], gate_up));
        tensors.insert(format!("{prefix}.down_proj"), (vec![4, 16, 12], down));
    }
    rewrite(&folder, &tensors);
    let tokens = fixture(name).join("expected.safetensors");
    let fused = dump(&folder, &tokens, &place.path("fused.safetensors"));
    let plain = dump(&fixture(name), &tokens, &place.path("plain.safetensors"));
    for whole in ["logits", "loss", "grad.lm_head.weight"] {
        assert_eq!(fused[whole], plain[whole], "{whole}");
    }
    let expert = &plain["grad.model.layers.1.mlp.experts.2.up_proj.weight"].1;
    let stack = &fused["grad.model.layers.1.mlp.experts.gate_up_proj"].1;
    assert_eq!(expert[..], stack[(2 * 24 + 12) * 16..3 * 24 * 16]);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let place = Place::new();
    let tokens = fixture("qwen3_moe").join("expected.safetensors");
    let refused = |folder: &Path, tokens: &Path| {
        let mut command = program();
        command
            .args(["dump", "--model"])
            .arg(folder)
            .arg("--tokens")
            .arg(tokens);
        fail(command.arg("--out").arg(place.path("never.safetensors")))
    };
    let folder = copy(&place, "qwen3_moe", |c| {
        c.insert("model_type".into(), json!("llama"));
    });
    let e = refused(&folder, &tokens);
    assert!(e.contains("qwen3_moe") && e.contains("llama"), "{e}");
    let folder = copy(&place, "qwen3_moe", |c| {
        c.insert("vocab_size".into(), json!(41));
    });
    let e = refused(&folder, &tokens);
    assert!(
        e.contains("model.embed_tokens.weight") && e.contains("[41, 16]"),
        "{e}"
    );
    let folder = copy(&place, "qwen3_moe", |_| ());
    let mut tensors = numbers(&folder.join("model.safetensors"));
    let router = tensors.remove("model.layers.1.mlp.gate.weight").unwrap();
    rewrite(&folder, &tensors);
    let e = refused(&folder, &tokens);
    assert!(
        e.contains("model.layers.1.mlp.gate.weight") && e.contains("no tensor with that name"),
        "{e}"
    );
    tensors.insert("model.layers.1.mlp.gate.weight".into(), router.clone());
    tensors.insert("model.layers.1.mlp.gate.bias".into(), router);
    rewrite(&folder, &tensors);
    let e = refused(&folder, &tokens);
    assert!(e.contains("gate.bias"), "{e}");
    let file = folder.join("model.safetensors");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let e = refused(&folder, &tokens);
    assert!(e.contains("a complete safetensors file"), "{e}");
    let e = refused(&fixture("qwen3_moe"), &file);
    assert!(e.contains("a complete safetensors file"), "{e}");
    let e = refused(
        &fixture("qwen3_moe"),
        &fixture("mixtral").join("model.safetensors"),
    );
    assert!(e.contains("tensor `tokens` of int64"), "{e}");
    let folder = copy(&place, "olmoe", |_| ());
    fs::remove_file(folder.join("model-00002-of-00004.safetensors")).unwrap();
    let e = refused(&folder, &fixture("olmoe").join("expected.safetensors"));
    assert!(e.contains("model-00002-of-00004.safetensors"), "{e}");
    assert!(!place.path("never.safetensors").exists());
}

#[test]
fn a_run_dumps_its_gradients_and_its_next_default_vectors() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--router", "default", "--steps", "3", "--quiet"]));
    let tokens: Vec<u8> = (0..2 * 9)
        .flat_map(|t: i64| (t * t % 97).to_le_bytes())
        .collect();
    let view = TensorView::new(Dtype::I64, vec![2, 9], &tokens).unwrap();
    let file = place.path("tokens.safetensors");
    safetensors::serialize_to_file([("tokens", view)], None, &file).unwrap();
    let run = place.path("run");
    let frozen = dump(&run, &file, &place.path("frozen.safetensors"));
    let mut command = program();
    command
        .args(["dump", "--train", "--model"])
        .arg(&run)
        .arg("--tokens")
        .arg(&file);
    succeed(command.arg("--out").arg(place.path("trained.safetensors")));
    let trained = numbers(&place.path("trained.safetensors"));
    let vectors = "model.layers.1.mlp.default_vectors";
    assert!(trained.contains_key(vectors) && !frozen.contains_key(vectors));
    assert_ne!(frozen["loss"], trained["loss"]);
    assert_eq!(frozen["logits"].0, [2, 8, 256]);
    assert!(frozen.contains_key("grad.model.layers.1.mlp.experts.gate_up_proj"));
    assert!(frozen.contains_key("grad.model.layers.0.self_attn.q_proj.weight"));
    // A checkpoint is compared with its digest also where it is named itself.
    let saved = place.path("run/checkpoints/step-3");
    dump(&saved, &file, &place.path("saved.safetensors"));
    let weights = saved.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 64].fill(0);
    fs::write(&weights, bytes).unwrap();
    let mut command = program();
    command
        .args(["dump", "--model"])
        .arg(&saved)
        .arg("--tokens");
    command.arg(&file).arg("--out").arg(place.path("never"));
    let line = fail(&mut command);
    assert!(line.contains("digest"), "{line}");
}

#[test]
fn a_run_is_imported_with_a_router_of_the_same_name_and_other_state() {
    let place = Place::new();
    let shrunk = ["--router", "default", "--set", "router.shrink=running"];
    succeed(&mut place.train("plain", &["--router", "default", "--steps", "2", "--quiet"]));
    succeed(&mut place.train(
        "shrunk",
        &[&shrunk[..], &["--steps", "2", "--quiet"]].concat(),
    ));
    for (from, set) in [("plain", &shrunk[..]), ("shrunk", &shrunk[..2])] {
        let out = place.path(&format!("from-{from}"));
        let mut command = program();
        command.args(["import", "--from"]).arg(place.path(from));
        command.args(set).arg("--data").arg(&place.text);
        succeed(command.arg("--out").arg(&out));
        let vectors = |run: &Path, step: u64| {
            let saved = run.join(format!("checkpoints/step-{step}/model.safetensors"));
            numbers(&saved)
                .remove("model.layers.1.mlp.default_vectors")
                .unwrap()
        };
        assert_eq!(vectors(&out, 0), vectors(&place.path(from), 2));
    }
}

#[test]
fn a_model_of_transformers_becomes_a_run_that_trains() {
    let place = Place::new();
    // Bytes need 256 entries: the embedding and the head are lengthened.
    let folder = copy(&place, "qwen2_moe", |c| {
        c.insert("vocab_size".into(), json!(256));
    });
    enlarge_vocabulary(&folder, 256);
    let run = place.path("imported");
    let import = |set: &str| {
        let mut command = program();
        command
            .args(["import", "--set", set, "--from"])
            .arg(&folder)
            .arg("--out")
            .arg(&run);
        command.arg("--data").arg(&place.text);
        command.args([
            "--set",
            "train.steps=2",
            "--set",
            "train.sequences_per_step=2",
        ]);
        command.args(["--set", "train.micro_batch=2"]);
        command
    };
    let e = fail(&mut import("model.hidden=32"));
    assert!(e.contains("model.sequence_length"), "{e}");
    let (said, _) = succeed(&mut import("model.sequence_length = 16"));
    assert!(said.contains("train --resume --out"), "{said}");
    succeed(&mut place.resume("imported"));
    assert_eq!(crate::common::steps_logged(&run), 2);
    let e = fail(&mut import("model.sequence_length=16"));
    assert!(e.contains("which holds a run"), "{e}");
}

#[test]
fn an_import_advises_what_it_can_do_and_its_text_replaces_a_mix() {
    let place = Place::new();
    let import = |folder: &Path, more: &[&str]| {
        let mut command = program();
        command.args(["import", "--from"]).arg(folder);
        command.arg("--out").arg(place.path("run")).args(more);
        fail(&mut command)
    };
    let folder = copy(&place, "qwen2_moe", |c| {
        c.insert("rms_norm_eps".into(), json!(0));
    });
    let e = import(&folder, &[]);
    assert!(
        e.contains("model.norm_eps") && e.contains("correct the file") && !e.contains("--set"),
        "{e}"
    );
    let e = import(&fixture("qwen2_moe"), &["--set", "train.device=sim"]);
    assert!(
        e.contains("model.") && e.contains("leave train.device out") && !e.contains("--set"),
        "{e}"
    );
    let mix = r#"data.mix=[{source = "mixed", weight = 1.0}]"#;
    let data = ["--set", mix, "--data", "missing.txt"];
    let e = import(&fixture("qwen2_moe"), &data);
    assert!(e.contains("missing.txt"), "{e}");
    fs::remove_file(folder.join("config.json")).unwrap();
    let e = import(&folder, &[]);
    assert!(e.contains("without manifest.json and config.json"), "{e}");
    assert!(!place.path("run").exists());
}

/// A program without the feature `text` knows the tokenizer's file by its digest alone.
#[test]
fn a_model_with_a_tokenizer_becomes_a_run_on_bytes_that_says_how_to_prepare_its_tokens() {
    let place = Place::new();
    let folder = copy(&place, "qwen2_moe", |c| {
        c.insert("vocab_size".into(), json!(256));
    });
    enlarge_vocabulary(&folder, 256);
    let import = |out: &str| {
        let mut command = program();
        command.args(["import", "--from"]).arg(&folder);
        command.arg("--out").arg(place.path(out));
        command.args(["--set", "model.sequence_length=16"]);
        command
    };
    let tokenizer = folder.join("tokenizer.json");
    fs::write(&tokenizer, "{}").unwrap();
    let (said, _) = succeed(&mut import("imported"));
    let advice = format!("data prepare TEXT --tokenizer {}", tokenizer.display());
    assert!(said.contains(&advice), "{said}");
    fs::remove_file(&tokenizer).unwrap();
    fs::create_dir(&tokenizer).unwrap();
    let e = fail(&mut import("other"));
    assert!(e.contains("tokenizer.json"), "{e}");
}

/// Gives a copied model, whose config was told so, `tokens` rows of embedding and head.
fn enlarge_vocabulary(folder: &Path, tokens: usize) {
    let mut tensors = BTreeMap::new();
    for file in fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("model") {
            if path.extension().is_some_and(|e| e == "safetensors") {
                tensors.extend(numbers(&path));
            }
            fs::remove_file(path).unwrap();
        }
    }
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        if let Some((shape, values)) = tensors.get_mut(name) {
            shape[0] = tokens;
            *values = values.iter().copied().cycle().take(tokens * 16).collect();
        }
    }
    rewrite(folder, &tensors);
}

/// The loss that `eval` printed.
#[cfg(feature = "text")]
fn loss_of(model: &Path, data: &Path) -> f64 {
    let mut command = program();
    command.args(["eval", "--model"]).arg(model);
    let (said, _) = succeed(command.arg("--data").arg(data));
    let line = said
        .lines()
        .find(|l| l.starts_with("validation loss"))
        .unwrap();
    line.split_whitespace().nth(2).unwrap().parse().unwrap()
}

#[cfg(feature = "text")]
#[test]
fn a_published_model_is_evaluated_and_trained_with_another_router_on_its_own_tokens() {
    let place = Place::new();
    let tokenizer = crate::tokens::tokenizer(place.folder.path(), 0);
    let (tokens, other) = (place.path("tokens"), place.path("other"));
    let prepare = |out: &Path, tokenizer: &Path| {
        let mut command = program();
        command.args(["data", "prepare"]).arg(&place.text);
        command.args(["--validation-fraction", "0.1", "--quiet", "--tokenizer"]);
        succeed(command.arg(tokenizer).arg("--out").arg(out));
    };
    prepare(&tokens, &tokenizer);
    fs::create_dir(place.path("another")).unwrap();
    prepare(&other, &crate::tokens::tokenizer(&place.path("another"), 3));
    for (name, router) in [
        ("olmoe", "default"),
        ("qwen2_moe", "default"),
        ("mixtral", "densemixer"),
        ("qwen3_moe", "topk"),
    ] {
        let folder = copy(&place, name, |config| {
            config.insert("vocab_size".into(), json!(264));
        });
        enlarge_vocabulary(&folder, 264);
        fs::copy(&tokenizer, folder.join("tokenizer.json")).unwrap();
        let run = place.path(&format!("run-{name}"));
        let import = |router: &str, data: &Path| {
            let mut command = program();
            command
                .args(["import", "--router", router, "--from"])
                .arg(&folder);
            command.arg("--data").arg(data).arg("--out").arg(&run);
            for set in [
                "train.steps=30",
                "train.sequences_per_step=4",
                "train.micro_batch=4",
                "train.learning_rate=0.01",
            ] {
                command.args(["--set", set]);
            }
            command
        };
        let e = fail(&mut import(router, &other));
        assert!(
            e.contains("own tokenizer") && e.contains("--tokenizer"),
            "{e}"
        );
        if ["mixtral", "qwen3_moe"].contains(&name) {
            let e = fail(&mut import("sparsemixer", &tokens));
            assert!(e.contains("renormalize") && e.contains("densemixer"), "{e}");
        }
        succeed(&mut import(router, &tokens));
        assert!(run.join("tokenizer.json").exists());
        let (source, begin) = (loss_of(&folder, &tokens), loss_of(&run, &tokens));
        assert_eq!(source, begin, "{name} with {router}");
        succeed(&mut place.resume(&format!("run-{name}")));
        let end = loss_of(&run, &tokens);
        assert!(end < begin - 0.1, "{name}: {begin} to {end}");
    }
    let folder = place.path("qwen3_moe-copy");
    let mut generate = program();
    generate.args(["generate", "--prompt", "word", "--tokens", "5", "--model"]);
    succeed(generate.arg(&folder));
    let mut analyze = program();
    analyze
        .args(["analyze", "--sequences", "2", "--data"])
        .arg(&tokens);
    succeed(analyze.arg("--model").arg(&folder));
    let e = fail(program().args(["eval", "--model"]).arg(&folder));
    assert!(e.contains("--data") && e.contains("tokenizer.json"), "{e}");
}

#[test]
fn a_head_of_its_own_counts_though_the_configuration_says_that_it_is_tied() {
    let folder = tempfile::tempdir().unwrap();
    let (source, copy) = (fixture("mixtral"), folder.path().join("model"));
    fs::create_dir(&copy).unwrap();
    let name = "model.safetensors";
    fs::copy(source.join(name), copy.join(name)).unwrap();
    let text = fs::read_to_string(source.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["tie_word_embeddings"] = json!(true);
    fs::write(copy.join("config.json"), config.to_string()).unwrap();
    let expected = source.join("expected.safetensors");
    let found = dump(&copy, &expected, &folder.path().join("out.safetensors"));
    assert!(worst(&found, &expected) <= 1e-9);
}
