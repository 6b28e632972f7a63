//! Tests of how the sources of a configuration are combined.

use super::*;
use crate::config::{Norm, Reduction};

fn with(preset: &str, set: &[&str]) -> Result<Config> {
    let mut layers = Layers::preset(preset);
    layers.set = set.iter().map(|s| s.to_string()).collect();
    Config::load(&layers, &|_| Ok(()))
}

fn error(set: &[&str]) -> String {
    with("tiny", set).unwrap_err().to_string()
}

#[test]
fn every_preset_with_every_expert_setting_is_valid_and_reads_back_equal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    for (preset, _) in PRESETS {
        for experts in ["8c1", "8c2", "32c1", "32c4", "64c6"] {
            let mut layers = Layers::preset(preset);
            layers.experts = Some(experts.into());
            layers.set = vec!["router.beta=0.5".into(), "train.recompute=[0, 1]".into()];
            let config = Config::load(&layers, &|_| Ok(())).unwrap();
            std::fs::write(&path, config.to_toml().unwrap()).unwrap();
            let mut again = Layers::preset("tiny");
            again.file = Some(path.clone());
            assert_eq!(Config::load(&again, &|_| Ok(())).unwrap(), config);
        }
    }
}

#[test]
fn tiny_is_what_the_method_says() {
    let c = with("tiny", &[]).unwrap();
    assert_eq!(c.model.expert_ffn_width, 352);
    assert_eq!(c.model.dense_ffn_width, 352);
    assert_eq!((c.model.head_dim, c.model.kv_heads), (64, 2));
    assert_eq!(c.model.dense_layers, [0]);
    assert_eq!(c.model.moe_layers(), [1, 2, 3]);
    assert_eq!((c.train.steps, c.train.sequences_per_step), (600, 16));
    assert_eq!(c.train.learning_rate, 3e-3);
    assert_eq!(c.train.betas, [0.9, 0.95]);
    assert_eq!(c.router.name, "default");
    assert_eq!(c.balance.aux_coefficient, 0.01);
    assert_eq!(c.balance.aux_reduction, Reduction::Sum);
}

#[test]
fn a_run_whose_configuration_names_no_reduction_keeps_the_mean() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    let text = with("tiny", &[]).unwrap().to_toml().unwrap();
    let (key, section) = ("aux_reduction = \"sum\"\n", "[balance]\n");
    assert!(text.contains(key) && text.contains(section));
    let without_key = text.replace(key, "");
    let mut table: Table = text.parse().unwrap();
    table.remove("balance");
    for saved in [without_key, table.to_string()] {
        std::fs::write(&path, &saved).unwrap();
        let mut layers = Layers::preset("tiny");
        layers.file = Some(path.clone());
        let of = |layers: &Layers| Config::load(layers, &|_| Ok(())).unwrap().balance;
        assert_eq!(of(&layers).aux_reduction, Reduction::Sum);
        layers.resolved = true;
        assert_eq!(of(&layers).aux_reduction, Reduction::Mean);
        let read: Config = toml::from_str(&saved).unwrap();
        assert_eq!(read.balance.aux_reduction, Reduction::Mean);
    }
    // A run whose configuration names the reduction uses that reduction.
    for said in ["sum", "mean"] {
        std::fs::write(
            &path,
            text.replace(key, &format!("aux_reduction = {said:?}\n")),
        )
        .unwrap();
        let mut layers = Layers::preset("tiny");
        layers.file = Some(path.clone());
        for resolved in [false, true] {
            layers.resolved = resolved;
            let read = Config::load(&layers, &|_| Ok(())).unwrap();
            assert_eq!(
                read.balance.aux_reduction == Reduction::Mean,
                said == "mean"
            );
        }
    }
}

#[test]
fn widths_of_experts_follow_the_hidden_size() {
    let mut layers = Layers::preset("557m");
    layers.experts = Some("32c4".into());
    let m = Config::load(&layers, &|_| Ok(())).unwrap().model;
    assert_eq!((m.num_experts, m.top_k), (32, 4));
    assert_eq!((m.expert_ffn_width, m.dense_ffn_width), (352, 352));
    let m = with("tiny", &["model.hidden=64"]).unwrap().model;
    assert_eq!((m.expert_ffn_width, m.dense_ffn_width), (176, 176));
    assert_eq!((m.head_dim, m.kv_heads), (32, 2));
    // The dense layer follows the experts, also if their width is set, unless its width is set too.
    let m = with("tiny", &["model.expert_ffn_width=96"]).unwrap().model;
    assert_eq!((m.expert_ffn_width, m.dense_ffn_width), (96, 96));
    let m = with("tiny", &["model.dense_ffn_width=1408"]).unwrap().model;
    assert_eq!((m.expert_ffn_width, m.dense_ffn_width), (352, 1408));
}

#[test]
fn later_layers_win() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.toml");
    std::fs::write(
        &path,
        "[train]\nsteps = 7\nseed = 7\n[model]\nnorm = \"layernorm\"",
    )
    .unwrap();
    let mut layers = Layers::preset("tiny");
    layers.file = Some(path);
    layers.set = vec!["train.steps=8".into(), "train.learning_rate=1".into()];
    layers.flags = vec![("--steps", "train.steps", Value::Integer(9))];
    let c = Config::load(&layers, &|_| Ok(())).unwrap();
    assert_eq!(c.model.norm, Norm::LayerNorm);
    assert_eq!((c.train.seed, c.train.steps), (7, 9));
    assert_eq!(c.train.learning_rate, 1.0);
}

#[test]
fn experts_have_priority_over_the_file_and_set_and_keep_a_width_that_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.toml");
    for (width, expected) in [("", 176), ("expert_ffn_width = 48", 48)] {
        let text = format!("[model]\nnum_experts = 4\ntop_k = 2\n{width}");
        std::fs::write(&path, text).unwrap();
        let mut layers = Layers::preset("tiny");
        layers.file = Some(path.clone());
        layers.set = vec!["model.top_k=3".into()];
        layers.experts = Some("16c1".into());
        let m = Config::load(&layers, &|_| Ok(())).unwrap().model;
        assert_eq!(
            (m.num_experts, m.top_k, m.expert_ffn_width),
            (16, 1, expected)
        );
    }
}

#[test]
fn a_source_that_is_set_after_a_mix_replaces_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.toml");
    let mix = "mix = [{ source = \"a\", weight = 1.0 }]";
    std::fs::write(&path, format!("[data]\n{mix}\nsource = \"b\"")).unwrap();
    let name = |set: &[&str], flag: Option<&str>| {
        let mut layers = Layers::preset("tiny");
        layers.file = Some(path.clone());
        layers.set = set.iter().map(|s| s.to_string()).collect();
        let flag = flag.map(|f| ("--data", "data.source", Value::String(f.into())));
        layers.flags = flag.into_iter().collect();
        Config::load(&layers, &|_| Ok(())).unwrap().data.name()
    };
    // In one file, the mix replaces the source.
    assert_eq!(name(&[], None), "a");
    assert_eq!(name(&["data.source=c"], None), "c");
    let mix = format!("data.{mix}").replace("\"a\"", "\"d\"");
    assert_eq!(name(&[&mix], None), "d");
    assert_eq!(name(&["data.source=c", &mix], None), "d");
    assert_eq!(name(&[&mix, "data.source=c"], None), "c");
    assert_eq!(name(&[&mix], Some("e")), "e");
}

#[test]
fn another_router_drops_the_settings_of_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.toml");
    std::fs::write(&path, "[router]\nbeta = 0.5\nname = \"default\"").unwrap();
    let mut layers = Layers::preset("tiny");
    layers.file = Some(path);
    let c = Config::load(&layers, &|_| Ok(())).unwrap();
    assert_eq!(c.router.settings["beta"].as_float(), Some(0.5));
    layers.set = vec!["router.renormalize=true".into()];
    layers.flags = vec![("--router", "router.name", Value::String("topk".into()))];
    let c = Config::load(&layers, &|_| Ok(())).unwrap();
    assert_eq!(c.router.name, "topk");
    assert_eq!(
        c.router.settings.keys().collect::<Vec<_>>(),
        ["renormalize"]
    );
}

#[test]
fn bare_words_are_strings() {
    let c = with("tiny", &["model.norm=layernorm", "data.source=my/books"]).unwrap();
    assert_eq!(c.model.norm, Norm::LayerNorm);
    assert_eq!(c.data.source, "my/books");
}

#[test]
fn an_unknown_key_names_itself_and_the_nearest_right_one() {
    for (set, near) in [
        ("model.hiden=64", "`model.hidden`"),
        ("train.lerning_rate=1", "`train.learning_rate`"),
        ("num_expert=4", "`model.num_experts`"),
        ("modle.heads=2", "`model.heads`"),
        ("data.source.path=2", "`data.source`"),
    ] {
        let e = error(&[set]);
        let key = set.split('=').next().unwrap();
        assert!(e.contains(&format!("`{key}`")) && e.contains(near), "{e}");
    }
    let e = Config::load(&Layers::preset("tyni"), &|_| Ok(())).unwrap_err();
    assert!(e.to_string().contains("did you mean `tiny`"), "{e}");
    let mut layers = Layers::preset("tiny");
    layers.experts = Some("8x3".into());
    let e = Config::load(&layers, &|_| Ok(())).unwrap_err().to_string();
    assert!(e.contains("--experts") && e.contains("`8x3`"), "{e}");
}

#[test]
fn a_wrong_type_names_the_key_and_the_value() {
    for (set, value) in [
        ("model.hidden=wide", "wide"),
        ("model.layers=-1", "-1"),
        ("model.norm=batchnorm", "batchnorm"),
        ("train.steps=1.5", "1.5"),
        ("train.betas=[0.9]", "0.9"),
        ("train.recompute=maybe", "maybe"),
        ("router.name=3", "3"),
    ] {
        let e = error(&[set]);
        let key = set.split('=').next().unwrap();
        assert!(e.contains(key) && e.contains(value), "{e}");
    }
    assert!(error(&["train.steps"]).contains("key=value"));
}

#[test]
fn an_impossible_shape_names_the_key_and_what_would_be_right() {
    for (set, key, right) in [
        (&["model.top_k=9"][..], "model.top_k", "num_experts = 8"),
        (&["model.head_dim=63"], "model.head_dim", "even"),
        (&["model.kv_heads=4"], "model.kv_heads", "heads = 2"),
        (&["model.hidden=0"], "model.hidden", "at least 1"),
        (&["model.heads=0"], "model.heads", "at least 1"),
        (&["model.num_experts=0"], "model.num_experts", "at least 1"),
        (
            &["model.sequence_length=0"],
            "model.sequence_length",
            "at least 1",
        ),
        (&["model.dense_layers=[4]"], "model.dense_layers", "0 to 3"),
        (
            &["model.dense_layers=[0,1,2,3]"],
            "model.dense_layers",
            "fewer",
        ),
        (&["train.micro_batch=5"], "train.micro_batch", "step = 16"),
        (&["train.steps=0"], "train.steps", "1 to"),
        (
            &["train.learning_rate=nan"],
            "train.learning_rate",
            "finite",
        ),
        (&["train.betas=[0.9,1.0]"], "train.betas", "[0, 1)"),
        (&["train.recompute=[9]"], "train.recompute", "0 to 3"),
        (
            &["balance.aux_coefficient=-1"],
            "balance.aux_coefficient",
            "from 0",
        ),
        (
            &["data.validation_fraction=0"],
            "data.validation_fraction",
            "between",
        ),
    ] {
        let e = error(set);
        assert!(e.contains(key) && e.contains(right), "{set:?}: {e}");
    }
}

#[test]
fn a_width_that_is_not_whole_names_the_keys_that_it_follows_from_and_what_is_allowed() {
    for (set, expected) in [
        (
            &["model.heads=3"][..],
            "model.heads: expected a divisor of model.hidden = 128, such as 2 or 4, got 3; \
             change model.heads or model.hidden, or set model.head_dim",
        ),
        (
            &["model.hidden=12", "model.heads=5"],
            "a divisor of model.hidden = 12, such as 3 or 6, got 5",
        ),
        (
            &["model.num_experts=3", "model.top_k=1"],
            "model.num_experts: expected a divisor of 22 · model.hidden = 2816, such as 2 or 4, got 3; \
             change model.num_experts or model.hidden, or set model.expert_ffn_width",
        ),
        (
            &["model.heads=128"],
            "model.head_dim: expected an even number, because RoPE rotates pairs of elements (default: model.hidden / model.heads = 128 / 128)",
        ),
        (
            &["model.heads=4", "train.device=sim"],
            "has kernels for (default: model.hidden / model.heads = 128 / 4), got 32",
        ),
    ] {
        let e = error(set);
        assert!(e.contains(expected), "{set:?}: {e}");
    }
}

#[test]
fn a_model_that_no_kernel_computes_is_refused_with_the_key() {
    let sizes = "model.head_dim=64 model.expert_ffn_width=8 model.dense_ffn_width=8";
    for (set, key, most) in [
        (
            "model.hidden=8256 model.num_experts=8",
            "model.hidden",
            "8192",
        ),
        (
            "model.heads=1025 model.kv_heads=1025",
            "model.heads",
            "1024",
        ),
        ("model.num_experts=257", "model.num_experts", "256"),
        (
            "model.layers=130 model.dense_layers=[0]",
            "model.layers",
            "128 MoE layers with balance losses where kernels run, got 129",
        ),
    ] {
        let mut all: Vec<_> = sizes.split(' ').chain(set.split(' ')).collect();
        let on_cpu = with("tiny", &all).map(drop);
        on_cpu.unwrap();
        all.push("train.device=sim");
        let e = error(&all);
        let expected = format!("{key}: expected at most {most}");
        assert!(e.contains(&expected), "{set}: {e}");
    }
}

/// Names of types in serde and Rust.
const TYPES: [&str; 14] = [
    "usize", "isize", "u64", "u32", "u16", "i64", "i32", "boolean", "sequence", "variant", "enum",
    "struct", "array", "untagged",
];

#[test]
fn a_value_of_any_wrong_type_is_answered_without_names_of_rust() {
    let table = with("tiny", &[]).unwrap().to_table().unwrap();
    let mut refused = 0;
    for (key, _) in flatten(&table) {
        for value in ["1.5", "-1", "word", "true", "[1.5]", "[\"a\"]", "{ a = 1 }"] {
            let Err(e) = with("tiny", &[&format!("{key}={value}")]) else {
                continue;
            };
            let e = e.to_string();
            assert!(e.starts_with(&key), "{e}");
            let expected = e[key.len()..].split(", got ").next().unwrap();
            assert!(!TYPES.iter().any(|t| expected.contains(t)), "{e}");
            // The values of `train.dtype` are names of types.
            assert!(!expected.contains("f64") || key == "train.dtype", "{e}");
            refused += 1;
        }
    }
    assert!(refused > 150, "{refused}");
    for (set, expected) in [
        ("train.learning_rate=fast", "expected a number, got"),
        ("train.steps=1.5", "expected a whole number, 0 or more, got"),
        ("train.graph=3", "expected true or false, got"),
        ("model.dense_layers=0", "expected a list, got"),
        ("train.betas=[0.9]", "expected a list of 2 values, got"),
        (
            "train.recompute=maybe",
            "expected true, false, or a list of layer numbers, got",
        ),
        (
            "data.mix=[{source = \"a\"}]",
            "expected a value for `weight`, got",
        ),
    ] {
        let e = error(&[set]);
        assert!(e.contains(expected), "{e}");
    }
}

#[test]
fn a_broken_file_names_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.toml");
    let mut layers = Layers::preset("tiny");
    layers.file = Some(path.clone());
    let e = Config::load(&layers, &|_| Ok(())).unwrap_err().to_string();
    assert!(e.contains("cannot read") && e.contains("mine.toml"), "{e}");
    std::fs::write(&path, "[train]\nsteps = = 3\n").unwrap();
    let e = Config::load(&layers, &|_| Ok(())).unwrap_err().to_string();
    assert!(e.contains("line 2"), "{e}");
    std::fs::write(&path, "[trian]\nsteps = 3\n").unwrap();
    let e = Config::load(&layers, &|_| Ok(())).unwrap_err().to_string();
    assert!(
        e.contains("`trian.steps`") && e.contains("`train.steps`"),
        "{e}"
    );
}

#[test]
fn names_of_other_programs_are_answered_with_the_key() {
    for (name, key) in [
        ("lr", "train.learning_rate"),
        ("train.batch_size", "train.sequences_per_step"),
        ("max_grad_norm", "train.gradient_clip"),
        ("model.num_experts_per_tok", "model.top_k"),
    ] {
        let e = error(&[&format!("{name}=1")]);
        assert!(e.ends_with(&format!("use `{key}`")), "{e}");
    }
    // Every suggested key exists.
    let known = with("tiny", &[]).unwrap().to_toml().unwrap();
    let known: Table = known.parse().unwrap();
    for (key, _) in crate::config::names::COMMON {
        assert!(get(&known, key).is_some(), "{key}");
    }
}

#[test]
fn a_batch_takes_a_micro_batch_that_divides_it() {
    let micro = |set: &[&str]| with("tiny", set).unwrap().train.micro_batch;
    assert_eq!(micro(&["train.sequences_per_step=24"]), 12);
    assert_eq!(micro(&["train.sequences_per_step=7"]), 7);
    assert_eq!(micro(&["train.sequences_per_step=34"]), 2);
    let e = error(&["train.sequences_per_step=24", "train.micro_batch=16"]);
    assert!(
        e.contains("a divisor of train.sequences_per_step = 24"),
        "{e}"
    );
}

#[test]
fn experts_are_any_two_numbers() {
    let of = |text: &str| {
        let mut layers = Layers::preset("tiny");
        layers.experts = Some(text.into());
        Config::load(&layers, &|_| Ok(()))
    };
    let model = of("44c3").unwrap().model;
    assert_eq!(
        (model.num_experts, model.top_k, model.expert_ffn_width),
        (44, 3, 64)
    );
    for wrong in ["44", "c3", "4c5", "0c0", "8x2"] {
        let e = of(wrong).unwrap_err().to_string();
        assert!(e.contains("NcK") && e.contains(wrong), "{e}");
    }
}
