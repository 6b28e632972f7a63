//! Tests of which runs a grid plans and which grids it rejects.

use super::grid::{Grid, Plan};

fn plan(text: &str) -> Plan {
    Grid::parse(text, "test").unwrap().plan().unwrap()
}

fn refused(text: &str) -> String {
    let grid = Grid::parse(text, "test");
    grid.and_then(|g| g.plan()).unwrap_err().to_string()
}

fn names(plan: &Plan) -> Vec<&str> {
    plan.runs.iter().map(|r| r.name.as_str()).collect()
}

#[test]
fn a_grid_is_the_product_of_its_axes_with_seeds_outermost() {
    let plan = plan(
        "[base]\nsteps = 7\n[axes]\nseed = [0, 5]\nrouter = [\"topk\", \"default\"]\ntrain.learning_rate = [1e-3, 2e-3]",
    );
    assert_eq!(
        names(&plan),
        [
            "topk-learning_rate=0.001-0",
            "topk-learning_rate=0.002-0",
            "default-learning_rate=0.001-0",
            "default-learning_rate=0.002-0",
            "topk-learning_rate=0.001-5",
            "topk-learning_rate=0.002-5",
            "default-learning_rate=0.001-5",
            "default-learning_rate=0.002-5",
        ]
    );
    let last = &plan.runs[7].config;
    assert_eq!((last.train.seed, last.train.steps), (5, 7));
    assert_eq!(
        (last.train.learning_rate, last.router.name.as_str()),
        (2e-3, "default")
    );
    assert_eq!(plan.varied().len(), 2);
}

#[test]
fn a_value_may_set_several_keys_and_products_share_runs() {
    let plan = plan(
        "name = \"{experts}-{router}\"\n[base]\nexperts = \"8c1\"\n\
         [[axes]]\nrouter = [\"topk\", { label = \"slow\", router = \"default\", \"router.beta\" = 0.99 }]\n\
         [[axes]]\nrouter = [\"topk\"]\nexperts = [\"8c1\", \"8c2\"]",
    );
    assert_eq!(names(&plan), ["8c1-topk", "8c1-slow", "8c2-topk"]);
    let slow = &plan.runs[1].config.router;
    assert_eq!(slow.settings["beta"].as_float(), Some(0.99));
    assert_eq!(plan.runs[2].config.model.top_k, 2);
}

#[test]
fn a_key_that_is_set_later_replaces_the_one_in_the_table_of_an_axis() {
    let text = "[axes]\nmethod = [{ label = \"a\", router = \"default\", \"router.beta\" = 0.5 }, \
                { label = \"b\", router = \"topk\", \"train.steps\" = 7 }]";
    let mut grid = Grid::parse(text, "test").unwrap();
    grid.set("steps", 9.into());
    let plan = grid.plan().unwrap();
    assert_eq!(names(&plan), ["a", "b"]);
    assert!(plan.runs.iter().all(|r| r.config.train.steps == 9));
    assert_eq!(
        plan.runs[0].config.router.settings["beta"].as_float(),
        Some(0.5)
    );
    let mut grid = Grid::parse(text, "test").unwrap();
    grid.vary("router", vec!["default".into()]);
    let plan = grid.plan().unwrap();
    assert_eq!(names(&plan), ["default-a", "default-b"]);
    assert!(plan.runs.iter().all(|r| r.config.router.name == "default"));
}

#[test]
fn a_source_replaces_a_mix_and_experts_replace_the_numbers_of_experts() {
    let mix = "data.mix = [{ source = \"a\", weight = 1.0 }]";
    let sources = |plan: &Plan| -> Vec<String> {
        let configs = plan.runs.iter().map(|r| &r.config);
        configs.map(|c| c.data.name()).collect()
    };
    let axis = plan(&format!("[base]\n{mix}\n[axes]\ndata = [\"b\", \"c\"]"));
    assert_eq!(sources(&axis), ["b", "c"]);
    // In one table, the mix replaces the source.
    let text = format!("[base]\n{mix}\ndata.source = \"b\"\n[axes]\nseed = [0]");
    assert_eq!(sources(&plan(&text)), ["a"]);
    let mut grid = Grid::parse(&text, "test").unwrap();
    grid.set("data", "d".into());
    assert_eq!(sources(&grid.plan().unwrap()), ["d"]);
    // Also one in the table of an axis.
    let text = format!("[axes]\nwhat = [{{ label = \"x\", {mix} }}]");
    let mut grid = Grid::parse(&text, "test").unwrap();
    grid.set("data", "d".into());
    assert_eq!(sources(&grid.plan().unwrap()), ["d"]);

    let experts = |plan: &Plan| -> Vec<(usize, usize)> {
        let models = plan.runs.iter().map(|r| &r.config.model);
        models.map(|m| (m.num_experts, m.top_k)).collect()
    };
    let axis = plan("[base]\nmodel.num_experts = 4\n[axes]\nexperts = [\"8c1\", \"32c4\"]");
    assert_eq!(experts(&axis), [(8, 1), (32, 4)]);
    let axis = plan("[base]\nexperts = \"8c1\"\n[axes]\nmodel.top_k = [1, 2]");
    assert_eq!(experts(&axis), [(8, 1), (8, 2)]);
    let mut grid = Grid::parse("[axes]\nmodel.top_k = [1, 2]\nseed = [0]", "test").unwrap();
    grid.set("experts", "8c4".into());
    assert_eq!(experts(&grid.plan().unwrap()), [(8, 4)]);
}

#[test]
fn a_short_run_is_evaluated_twenty_times_unless_its_interval_is_set() {
    let interval = |base: &str| {
        let plan = plan(&format!("[base]\n{base}\n[axes]\nseed = [0]"));
        plan.runs[0].config.train.eval_interval
    };
    assert_eq!(interval("steps = 60"), 3);
    assert_eq!(interval("steps = 60\nwidth = 2"), 3);
    assert_eq!(interval("steps = 5"), 1);
    assert_eq!(interval("steps = 60000"), 100);
    assert_eq!(interval("steps = 60\ntrain.eval_interval = 50"), 50);
}

#[test]
fn a_width_multiplies_hidden_size_and_heads() {
    let plan = plan("[base]\nexperts = \"8c1\"\n[axes]\nwidth = [0.5, 2]");
    let model = |i: usize| &plan.runs[i].config.model;
    assert_eq!(
        (model(0).hidden, model(0).heads, model(0).head_dim),
        (64, 1, 64)
    );
    assert_eq!(
        (model(1).hidden, model(1).heads, model(1).expert_ffn_width),
        (256, 4, 704)
    );
    assert!(refused("[axes]\nwidth = [0.3]").contains("whole number"));
}

#[test]
fn the_error_for_an_invalid_grid_names_the_key() {
    for (text, parts) in [
        ("", &["at least one axis", "no axis"][..]),
        (
            "[axes]\nrouter = []",
            &["axis `router.name`", "an empty list"],
        ),
        (
            "[axes]\nrouter = \"topk\"",
            &["axis `router.name`", "a list of values"],
        ),
        ("[axes]\nrouter = [\"topc\"]", &["run topc", "topk"]),
        (
            "[axes]\ntrain.lerning_rate = [1e-3]",
            &["grid", "`train.lerning_rate`", "`train.learning_rate`"],
        ),
        (
            "[axes]\nseed = [0, 1, 0]",
            &["one run with the name `0`", "the same run twice"],
        ),
        (
            "name = \"{router}\"\n[axes]\nrouter = [\"topk\"]\nseed = [0, 1]",
            &["`topk`", "train.seed, 0 and 1"],
        ),
        (
            "name = \"{rooter}\"\n[axes]\nrouter = [\"topk\"]",
            &["`rooter`", "router"],
        ),
        ("[axis]\nrouter = [\"topk\"]", &["test", "line 1", "axis"]),
        ("[axes]\nwhat = [{ \"router.beta\" = 0.5 }]", &["a label"]),
        ("[axes]\nexperts = [\"8c9\"]", &["experts", "NcK"]),
        (
            "[axes]\nwhat = [{ label = \"a\", steps = 7 }, { label = \"b\", steps = 7 }]",
            &["the same configuration for `a` and `b`"],
        ),
        (
            "name = \"..\"\n[axes]\nseed = [0]",
            &["names of runs", "`..`"],
        ),
        ("name = \"\"\n[axes]\nseed = [0]", &["names of runs", "``"]),
        (
            "[axes]\ndata.document_separator = [\"\"]",
            &["names of runs"],
        ),
    ] {
        let said = refused(text);
        for part in parts {
            assert!(said.contains(part), "no `{part}` in: {said}");
        }
    }
}

#[test]
fn lists_split_at_commas_outside_of_brackets() {
    let shown = |list: &str| -> Vec<String> {
        let values = super::values(list).unwrap();
        values.iter().map(ToString::to_string).collect()
    };
    assert_eq!(shown("topk, default"), ["\"topk\"", "\"default\""]);
    assert_eq!(
        shown("[0.9, 0.95],[0.9, 0.99]"),
        ["[0.9, 0.95]", "[0.9, 0.99]"]
    );
    assert_eq!(shown("1e-3,3"), ["0.001", "3"]);
    assert!(super::values("1,,2").is_err() && super::values("").is_err());
}
