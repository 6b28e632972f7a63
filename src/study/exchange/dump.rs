//! Writes a model's outputs and gradients for given tokens, to compare them with another framework.

use super::source::{Piece, Source};
use super::tensors::{Output, Tensors, write};
use crate::config::{Layers, Precision};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::batch::Sequences;
use crate::routers::{Pass, Phase};
use crate::tape::{Gradients, Tape};
use crate::train::checkpoint;
use std::path::{Path, PathBuf};

/// The input of [`dump`].
pub struct Options {
    /// A model's folder, a run or a checkpoint.
    pub model: PathBuf,
    /// A safetensors file with `tokens`, int64 `[B, S + 1]`.
    pub tokens: PathBuf,
    /// Precision of the arithmetic and of the output.
    pub dtype: Precision,
    /// Whether to run the model in training mode, and to write the router's new state as well.
    pub train: bool,
}

/// Writes `logits [B, S, V]`, `loss` (mean cross-entropy of the next tokens, without other losses) and `grad.NAME` for
/// every parameter, with the name and shape that it has in the model's files. In training mode it also writes the router's
/// new state. Returns lines for the user.
///
/// # Errors
/// When the model or the tokens cannot be read, the tokens do not fit the model, or `out` cannot be written.
pub fn dump(options: &Options, out: &Path) -> Result<Vec<String>> {
    let source = Source::open(&options.model)?;
    let (tokens, [sequences, length]) = read_tokens(options, source.file.model.vocab_size)?;
    let longest = source.file.model.sequence_length;
    if length > longest + 1 {
        return Err(Error::file(
            &options.tokens,
            format!("tokens [B, S + 1] with S up to the model's {longest}"),
            format!("[{sequences}, {length}]"),
            "use shorter sequences",
        ));
    }
    let mut config = source.config(&Layers::preset("tiny"))?;
    config.train.dtype = options.dtype;
    // The RoPE tables are made for the given length, not for the longest sequence.
    config.model.sequence_length = length - 1;
    let (model, pieces) = source.model(&config)?;
    let phase = if options.train {
        Phase::Train
    } else {
        Phase::Evaluate
    };
    let (tape, weights) = (Tape::new(), model.weights());
    let pass = Pass::single(phase);
    let (logits, loss) =
        model.logits_and_loss(&tape, &weights, Sequences::new(&tokens, sequences), pass)?;
    let mut store = Gradients::new(weights.len());
    let (vocabulary, value) = (logits.shape().width(), loss.tensor().clone());
    tape.backward(&loss, 1.0, &mut store)?;
    let dtype = model.dtype();
    let mut arrays = vec![
        Output {
            name: "logits".into(),
            shape: vec![sequences, length - 1, vocabulary],
            dtype,
            bytes: logits.bytes().to_vec(),
        },
        Output {
            name: "loss".into(),
            shape: vec![],
            dtype,
            bytes: value.bytes().to_vec(),
        },
    ];
    arrays.extend(gradients(&model, &pieces, &mut store));
    if options.train {
        model.end_step()?;
        let layers = config.model.moe_layers();
        for (layer, state) in layers.iter().zip(model.layer_states_mut().iter_mut()) {
            state.commit();
            arrays.extend(state.tensors().map(|(name, tensor)| Output {
                name: checkpoint::router_state(*layer, name),
                shape: tensor.shape().to_vec(),
                dtype: tensor.dtype(),
                bytes: tensor.bytes().to_vec(),
            }));
        }
    }
    write(out, &arrays)?;
    Ok(vec![
        format!("model  {}", source.folder().display()),
        format!(
            "loss   {:.12} nats, {} tokens",
            value.item()?,
            sequences * (length - 1)
        ),
        format!("wrote  {} arrays to {}", arrays.len(), out.display()),
    ])
}

/// Returns the gradient of each piece of a parameter; zeros if the loss does not depend on the parameter.
fn gradients<'a>(
    model: &'a Model,
    pieces: &'a [Piece],
    store: &'a mut Gradients,
) -> impl Iterator<Item = Output> + 'a {
    pieces.iter().map(move |piece| {
        let like = &model.parameters[piece.parameter].value;
        let zeros = || crate::tensor::Tensor::zeros(like.device(), like.dtype(), like.shape());
        let gradient = store.get_or(piece.parameter, zeros);
        let (size, end) = (model.dtype().size(), piece.offset + piece.elements());
        Output {
            name: format!("grad.{}", piece.name),
            shape: piece.shape.clone(),
            dtype: model.dtype(),
            bytes: gradient.bytes()[piece.offset * size..end * size].to_vec(),
        }
    })
}

fn read_tokens(options: &Options, vocabulary: usize) -> Result<(Vec<i32>, [usize; 2])> {
    let (tokens, shape) = Tensors::file(&options.tokens)?.integers("tokens")?;
    let wrong = |got: String, help: &str| {
        let expected = format!("`tokens` [B, S + 1] of int64 below {vocabulary}");
        Error::file(&options.tokens, expected, got, help)
    };
    let [sequences, length] = shape[..] else {
        return Err(wrong(format!("shape {shape:?}"), "write a matrix"));
    };
    if sequences == 0 || length < 2 {
        return Err(wrong(
            format!("shape {shape:?}"),
            "give a sequence of two tokens or more",
        ));
    }
    let inside = |t: &&i64| !(0..vocabulary as i64).contains(*t);
    if let Some(outside) = tokens.iter().find(inside) {
        return Err(wrong(
            format!("token {outside}"),
            "use the model's tokenizer",
        ));
    }
    Ok((
        tokens.into_iter().map(|t| t as i32).collect(),
        [sequences, length],
    ))
}
