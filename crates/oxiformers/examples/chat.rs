//! Ask a model a question: `cargo run --release -p oxiformers --example chat -- "Why is the sky blue?"`

use std::io::Write;
use std::ops::ControlFlow;

use oxiformers::{FromPretrained, LanguageModel, Message};

fn main() -> Result<(), oxiformers::Error> {
    let question = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "What is the capital of France?".into());
    let model = LanguageModel::from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")?;
    let mut chat = model.conversation();
    chat.messages.push(Message::user(question));
    oxiformers::block_on(chat.answer(model.generation_config.clone(), |tokens| {
        tokens.iter().for_each(|token| print!("{}", token.text));
        // A terminal that is gone is no reason to fail.
        let _ = std::io::stdout().flush();
        ControlFlow::Continue(())
    }))?;
    println!();
    Ok(())
}
