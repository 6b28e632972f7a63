//! Exports for transformers: files, keys, tensors, and what a user meets. `scripts/compare-hf`
//! compares what they compute.

use crate::common::{Place, fail, program, succeed};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

fn export(place: &Place, run: &str, out: &str) -> Command {
    let mut command = program();
    command.args(["export", "--to", "hf", "--model"]);
    command
        .arg(place.path(run))
        .arg("--out")
        .arg(place.path(out));
    command
}

/// Trains one step with these settings and exports to `out`; what the export printed.
fn exported(place: &Place, out: &str, sets: &[&str]) -> String {
    let run = format!("run-{out}");
    let mut train = place.train(&run, &["--steps", "1"]);
    for set in sets {
        train.args(["--set", set]);
    }
    succeed(&mut train);
    succeed(&mut export(place, &run, out)).0
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Shape, dtype and bytes of each tensor of a file.
fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Dtype, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, t)| {
            let own = (t.shape().to_vec(), t.dtype(), t.data().to_vec());
            (name.to_string(), own)
        })
        .collect()
}

#[test]
fn topk_is_written_as_qwen2_moe_expert_by_expert() {
    let place = Place::new();
    let sets = ["router.name=topk", "model.norm=rmsnorm", "model.kv_heads=1"];
    let printed = exported(&place, "hf", &sets);
    assert!(printed.contains("qwen2_moe"), "{printed}");
    let out = place.path("hf");
    let files = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names(&out), files);
    // Else transformers 4 gives the model token types, which it refuses.
    let inputs = &json_file(&out.join("tokenizer_config.json"))["model_input_names"];
    assert_eq!(*inputs, json!(["input_ids", "attention_mask"]));
    let config = json_file(&out.join("config.json"));
    for (key, value) in [
        ("model_type", json!("qwen2_moe")),
        ("architectures", json!(["Qwen2MoeForCausalLM"])),
        ("hidden_size", json!(16)),
        ("num_key_value_heads", json!(1)),
        ("mlp_only_layers", json!([0])),
        ("num_experts", json!(4)),
        ("num_experts_per_tok", json!(1)),
        ("norm_topk_prob", json!(false)),
        ("qkv_bias", json!(false)),
        ("shared_expert_intermediate_size", json!(0)),
        ("max_position_embeddings", json!(16)),
        ("rms_norm_eps", json!(1e-5)),
        ("torch_dtype", json!("float32")),
    ] {
        assert_eq!(config[key], value, "{key}");
    }

    // F = 22 D / E = 88, of the dense layer too.
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| drop(expected.insert(name, shape.to_vec()));
    for name in ["model.embed_tokens", "lm_head"] {
        add(format!("{name}.weight"), &[256, 16]);
    }
    add("model.norm.weight".into(), &[16]);
    for layer in 0..2 {
        let prefix = format!("model.layers.{layer}");
        for (name, rows) in [("q", 16), ("k", 8), ("v", 8), ("o", 16)] {
            add(
                format!("{prefix}.self_attn.{name}_proj.weight"),
                &[rows, 16],
            );
        }
        for name in ["input", "post_attention"] {
            add(format!("{prefix}.{name}_layernorm.weight"), &[16]);
        }
    }
    let mut network = |prefix: String, width: usize| {
        for name in ["gate", "up"] {
            add(format!("{prefix}.{name}_proj.weight"), &[width, 16]);
        }
        add(format!("{prefix}.down_proj.weight"), &[16, width]);
    };
    network("model.layers.0.mlp".into(), 88);
    network("model.layers.1.mlp.shared_expert".into(), 0);
    (0..4).for_each(|e| network(format!("model.layers.1.mlp.experts.{e}"), 88));
    add("model.layers.1.mlp.gate.weight".into(), &[4, 16]);
    add(
        "model.layers.1.mlp.shared_expert_gate.weight".into(),
        &[1, 16],
    );
    let found = tensors(&out.join("model.safetensors"));
    let shapes = found.iter().map(|(name, t)| (name.clone(), t.0.clone()));
    assert_eq!(shapes.collect::<BTreeMap<_, _>>(), expected);

    // Expert 2's up projection and expert 3's down projection where a checkpoint has them.
    let own = tensors(&place.path("run-hf/checkpoints/step-1/model.safetensors"));
    let matrix = 88 * 16 * 4;
    for (joined, name, index) in [
        ("gate_up_proj", "2.up_proj", 5),
        ("down_proj", "3.down_proj", 3),
    ] {
        let joined = &own[&format!("model.layers.1.mlp.experts.{joined}")].2;
        let (_, dtype, single) = &found[&format!("model.layers.1.mlp.experts.{name}.weight")];
        assert_eq!(*dtype, Dtype::F32);
        assert!(single[..] == joined[index * matrix..(index + 1) * matrix]);
    }
}

#[test]
fn norms_of_each_head_make_it_qwen3_moe() {
    let place = Place::new();
    let sets = [
        "router.name=densemixer",
        "model.norm=rmsnorm",
        "model.top_k=2",
        "router.renormalize=true",
        "model.qk_norm=head",
    ];
    exported(&place, "hf", &sets);
    let config = json_file(&place.path("hf/config.json"));
    assert_eq!(config["model_type"], "qwen3_moe");
    assert_eq!(config["norm_topk_prob"], true);
    let found = tensors(&place.path("hf/model.safetensors"));
    assert_eq!(found["model.layers.1.self_attn.q_norm.weight"].0, [8]);
    assert!(!found.keys().any(|name| name.contains("shared_expert")));
}

#[test]
fn default_vectors_come_with_their_program_and_in_bf16() {
    let place = Place::new();
    let printed = exported(
        &place,
        "hf",
        &["router.name=default", "model.norm=layernorm"],
    );
    assert!(printed.contains("LayerNorm, router default"), "{printed}");
    let out = place.path("hf");
    for file in ["modeling_routegrad.py", "configuration_routegrad.py"] {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/study/export/hf");
        assert!(fs::read(out.join(file)).unwrap() == fs::read(source.join(file)).unwrap());
    }
    let config = json_file(&out.join("config.json"));
    assert_eq!(config["model_type"], "routegrad");
    assert_eq!(config["norm_type"], "layernorm");
    assert_eq!(config["router"]["name"], "default");
    let own = tensors(&place.path("run-hf/checkpoints/step-1/model.safetensors"));
    assert!(tensors(&out.join("model.safetensors")) == own);

    succeed(export(&place, "run-hf", "half").args(["--dtype", "bf16"]));
    let half = tensors(&place.path("half/model.safetensors"));
    assert!(half.keys().eq(own.keys()));
    for (name, (shape, dtype, bytes)) in half {
        let (own_shape, _, exact) = &own[&name];
        assert_eq!(shape, *own_shape);
        assert_eq!(dtype, Dtype::BF16, "{name}");
        let pairs = bytes.chunks_exact(2).zip(exact.chunks_exact(4));
        for (rounded, exact) in pairs {
            let rounded = u16::from_le_bytes([rounded[0], rounded[1]]);
            let rounded = f32::from_bits(u32::from(rounded) << 16);
            let exact = f32::from_le_bytes(exact.try_into().unwrap());
            assert!((rounded - exact).abs() <= exact.abs() / 256.0, "{name}");
        }
    }
    assert_eq!(
        json_file(&place.path("half/config.json"))["torch_dtype"],
        "bfloat16"
    );
}

#[test]
fn default_vectors_that_evaluation_leaves_out_are_left_out() {
    let place = Place::new();
    for key in ["use_at_evaluation", "pass_forward"] {
        let off = format!("router.{key}=false");
        exported(
            &place,
            key,
            &["router.name=default", "model.norm=rmsnorm", &off],
        );
        let out = place.path(key);
        assert_eq!(
            json_file(&out.join("config.json"))["model_type"],
            "qwen2_moe"
        );
        let found = tensors(&out.join("model.safetensors"));
        assert!(!found.keys().any(|name| name.contains("default_vectors")));
    }
}

#[test]
fn an_export_without_the_state_of_training_is_read_again() {
    let place = Place::new();
    for (out, sets) in [
        ("remoe", &["router.name=remoe"][..]),
        (
            "default",
            &[
                "router.name=default",
                "router.use_at_evaluation=false",
                "model.norm=layernorm",
            ],
        ),
    ] {
        exported(&place, out, sets);
        let config = json_file(&place.path(out).join("config.json"));
        assert_eq!(config["model_type"], "routegrad");
        let text = |model: &str| {
            let mut generate = program();
            generate.args(["generate", "--tokens", "9", "--model"]);
            succeed(generate.arg(place.path(model))).0
        };
        assert_eq!(text(out), text(&format!("run-{out}")));
        let mut import = program();
        import.args(["import", "--from"]).arg(place.path(out));
        succeed(import.arg("--out").arg(place.path(&format!("again-{out}"))));
    }
}

#[test]
fn what_is_there_is_not_overwritten() {
    let place = Place::new();
    succeed(&mut place.train("run", &["--steps", "1"]));
    fs::create_dir(place.path("full")).unwrap();
    fs::write(place.path("full/notes.txt"), "mine").unwrap();
    fs::write(place.path("file"), "mine").unwrap();
    for out in ["full", "file"] {
        let error = fail(&mut export(&place, "run", out));
        assert!(error.contains("a new or an empty folder"), "{error}");
    }
    assert_eq!(names(&place.path("full")), ["notes.txt"]);
    assert_eq!(fs::read(place.path("file")).unwrap(), b"mine");

    // A model that cannot be read leaves nothing behind either.
    let before = names(place.folder.path());
    fail(&mut export(&place, "full", "new"));
    assert_eq!(names(place.folder.path()), before);

    fs::create_dir(place.path("empty")).unwrap();
    succeed(&mut export(&place, "run", "empty"));
    assert!(place.path("empty/model.safetensors").exists());
}

#[test]
fn a_vocabulary_that_is_not_the_bytes_has_no_tokenizer() {
    let place = Place::new();
    let printed = exported(&place, "hf", &["model.vocab_size=300"]);
    assert!(printed.contains("tokenizer     none"), "{printed}");
    assert!(!place.path("hf/tokenizer.json").exists());
    assert!(!place.path("hf/tokenizer_config.json").exists());
}
