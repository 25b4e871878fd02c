//! `oxiformers generate`: continue a prompt, or answer it with what an encoder-decoder makes of it.

use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use oxiformers::{
    Constraint, Draft, FinishReason, Generated, Grammar, Message, RenderOptions, Step, block_on,
};
use serde_json::json;

use crate::args::{GenerateArgs, RunArgs};
use crate::interrupt;
use crate::session::TextModel;

/// Without a limit from the user or the model.
const MAX_NEW_TOKENS: usize = 256;

pub fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    let prompt = read_prompt(&args.prompt)?;
    let grammar = grammar(args)?;
    let begin = Instant::now();
    let model = TextModel::load(&args.model, &args.run)?
        .with_languages(args.src_lang.as_deref(), args.tgt_lang.as_deref())?;
    let assistant = match &args.assistant {
        Some(name) => Some(load_assistant(name, args, &model)?),
        None => None,
    };
    let load_s = begin.elapsed().as_secs_f64();

    let mut config = args.sampling.apply(model.generation_config().clone())?;
    if config.max_new_tokens.is_none() && config.max_length.is_none() {
        config.max_new_tokens = Some(MAX_NEW_TOKENS);
    }
    let ids = match (&model, args.chat) {
        (_, false) => model.tokenizer().encode(&prompt, true)?,
        (TextModel::Language(model), true) => {
            model.encode_chat(&[Message::user(prompt)], &RenderOptions::generation())?
        }
        (TextModel::Seq2Seq(model), true) => {
            bail!(
                "--chat: {} is an encoder-decoder, which has no chat template",
                model.name
            )
        }
    };
    // Beams have no steps, and several texts at once cannot be streamed to one place.
    let whole = config.num_beams > 1 || config.num_return_sequences > 1;
    let eos = config.eos_token_id.clone();
    if args.prompt_lookup.is_some() {
        config.prompt_lookup_num_tokens = args.prompt_lookup;
    }
    let mut generator = model.generator(config);
    if let Some(grammar) = grammar {
        let vocab_size = model.network().vocab_size();
        let writes = model.tokenizer().for_target(None)?;
        generator = generator.with_constraint(Constraint::new(&grammar, &writes, vocab_size, &eos)?);
    }
    if let Some(assistant) = &assistant {
        generator = generator.with_draft(Draft::Assistant(assistant.network()));
    } else if args.prompt_lookup.is_some() {
        generator = generator.with_draft(Draft::PromptLookup);
    }

    let begin = Instant::now();
    let mut first = None;
    let mut interrupted = false;
    let mut out = io::stdout().lock();
    let results: Vec<Generated> = if whole {
        block_on(generator.generate(std::slice::from_ref(&ids)))?
    } else {
        interrupt::watch();
        let mut generation = generator.start(std::slice::from_ref(&ids), None)?;
        loop {
            match block_on(generation.step())? {
                Step::Prompt { .. } => {}
                Step::Tokens(tokens) => {
                    first.get_or_insert_with(|| begin.elapsed().as_secs_f64());
                    if !args.json {
                        for token in &tokens {
                            write!(out, "{}", token.text)?;
                        }
                        out.flush()?;
                    }
                }
                Step::Done => break,
            }
            if interrupt::happened() {
                interrupted = true;
                break;
            }
        }
        generation.finish()
    };
    let total_s = begin.elapsed().as_secs_f64();
    if !args.json {
        if !whole {
            writeln!(out)?;
        }
        for result in results.iter().filter(|_| whole) {
            writeln!(out, "{}", result.text)?;
        }
        return Ok(());
    }
    let prompt_s = first.unwrap_or(total_s);
    let tokens: usize = results.iter().map(|result| result.ids.len()).sum();
    let decoded = tokens.saturating_sub(results.len()) as f64;
    let reason = |result: &Generated| {
        if interrupted {
            "interrupted"
        } else {
            FinishReason::as_str(result.finish_reason)
        }
    };
    let [result, others @ ..] = results.as_slice() else {
        bail!("nothing was generated");
    };
    let mut report = json!({
        "prompt_ids": ids,
        "ids": result.ids,
        "text": result.text,
        "finish_reason": reason(result),
        "usage": {
            "prompt_tokens": ids.len(),
            "completion_tokens": tokens,
            "total_tokens": ids.len() + tokens,
        },
        "timings": {
            "load_s": load_s,
            "prompt_s": prompt_s,
            "decode_s": total_s - prompt_s,
            "decode_tokens_per_s": if decoded > 0.0 && total_s > prompt_s {
                Some(decoded / (total_s - prompt_s))
            } else {
                None
            },
        },
    });
    if !others.is_empty() {
        let all = results.iter().map(|result| {
            json!({
                "ids": result.ids, "text": result.text, "finish_reason": reason(result), "score": result.score,
            })
        });
        report["sequences"] = all.collect();
    }
    Ok(writeln!(out, "{report}")?)
}

fn read_prompt(prompt: &str) -> anyhow::Result<String> {
    if prompt != "-" {
        return Ok(prompt.to_string());
    }
    let mut text = String::new();
    io::stdin().read_to_string(&mut text).context("standard input")?;
    Ok(text)
}

fn grammar(args: &GenerateArgs) -> anyhow::Result<Option<Grammar>> {
    let read = |path: &Path| std::fs::read_to_string(path).with_context(|| path.display().to_string());
    Ok(match (&args.schema, &args.regex, &args.grammar) {
        (Some(path), ..) => {
            let schema = serde_json::from_str(&read(path)?).with_context(|| path.display().to_string())?;
            Some(Grammar::JsonSchema(schema))
        }
        (_, Some(regex), _) => Some(Grammar::Regex(regex.clone())),
        (_, _, Some(path)) => Some(Grammar::Lark(read(path)?)),
        _ => None,
    })
}

fn load_assistant(name: &str, args: &GenerateArgs, model: &TextModel) -> anyhow::Result<TextModel> {
    // Adapters are those of the model.
    let run = RunArgs {
        adapter: Vec::new(),
        ..args.run.clone()
    };
    let assistant = TextModel::load(name, &run)?;
    let probe = "The quick brown fox: 3.14, naïve 日本語\n\tend";
    if assistant.tokenizer().encode(probe, false)? != model.tokenizer().encode(probe, false)? {
        bail!(
            "--assistant {name}: its tokenizer is not that of {}; drafts need the same tokens",
            args.model
        );
    }
    Ok(assistant)
}
