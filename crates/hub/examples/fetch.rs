//! Fetches a model, or the default one, and lists its files:
//! `cargo run -p oxiformers-hub --features fetch --example fetch -- org/name`.

use oxiformers_hub::{Bars, FetchOptions, Result, default_chat_model, resolve};

fn main() -> Result<()> {
    let options = FetchOptions::from_env().with_progress(Bars::new());
    let files = match std::env::args().nth(1) {
        Some(name) => resolve(&name.parse()?, &options)?,
        None => default_chat_model(&options, &mut |line| eprintln!("{line}"))?,
    };
    println!("{}", files.name());
    for name in files.names() {
        println!(
            "  {name}  {} bytes",
            files.get(name)?.map_or(0, |bytes| bytes.len())
        );
    }
    Ok(())
}
