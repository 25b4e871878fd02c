//! Templates that mean harm: an error value in short time and bounded memory, whatever they do.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use oxiformers_processors::{ChatTemplate, Message, RenderOptions};
use proptest::prelude::*;

/// Counts what is allocated.
struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator with the arguments that came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(USED.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller keeps the contract of `dealloc`, and the pointer came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;
/// One test at a time, so that each counts its own memory.
static ALONE: Mutex<()> = Mutex::new(());

/// Most that a rendering may take in these tests.
const MEMORY: usize = 400 << 20;
/// A second at most, with room for a busy machine.
const TIME: Duration = Duration::from_secs(3);

/// Renders within the bounds; the text, or the error's.
fn render(source: &str) -> Result<String, String> {
    let before = USED.load(Relaxed);
    PEAK.store(before, Relaxed);
    let started = Instant::now();
    let messages = [Message::user("Hello"), Message::assistant("Hi")];
    let result = ChatTemplate::new(source)
        .and_then(|template| template.render(&messages, &RenderOptions::generation()))
        .map_err(|error| error.to_string());
    let (took, memory) = (started.elapsed(), PEAK.load(Relaxed) - before);
    let shown: String = source.chars().take(120).collect();
    assert!(took < TIME, "{took:?}: {shown}");
    assert!(memory < MEMORY, "{memory} bytes: {shown}");
    result
}

fn refused(source: &str) {
    let _alone = ALONE.lock().unwrap_or_else(|error| error.into_inner());
    let text = render(source);
    assert!(text.is_err(), "{source}: {:?}", text.map(|text| text.len()));
}

#[test]
fn endless_loops() {
    for source in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a * b %}{% endfor %}{% endfor %}",
        "{% for a in range(10**18) %}{% endfor %}",
        "{% for a in range(10**18) %}{{ a }}{% endfor %}",
        "{% for a in range(0, 10**18, 3) if false %}{% endfor %}",
        "{{ range(10**18) | list | length }}",
        "{{ range(10**18) | map('string') | join }}",
        "{{ range(10**18) | sum }}",
        "{{ range(10**18) | tojson }}",
        "{{ range(10**18) | sort }}",
        "{{ range(10**18) }}",
        "{{ (-1) in range(10**18) }}",
        "{% for a in 'x' * 10**6 %}{% for b in 'x' * 10**6 %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(1000) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(1000) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(1000) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(1000) %}{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(1000) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(1000) %}{% set ns.x = ns.x.join(['', '', ns.x]) %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(1000) %}{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}{% endfor %}",
    ] {
        refused(source);
    }
}

#[test]
fn shared_parts_many_times() {
    let nested =
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    for show in [
        "{{ ns.x }}",
        "{{ ns.x ~ '' }}",
        "{{ ns.x | string }}",
        "{{ ns.x | tojson }}",
        "{{ ns.x | tojson(indent=200) }}",
        "{{ ns.x == ns.x }}{{ ns.x }}",
        "{{ ','.join([ns.x]) }}",
        "{{ [ns.x] | join(',') }}",
        "{{ '{}'.format(ns.x) }}",
        "{{ '%s' | format(ns.x) }}",
        "{{ ns.x | pprint }}",
        "{{ raise_exception(ns.x) }}",
    ] {
        refused(&format!("{nested}{show}"));
    }
    let _alone = ALONE.lock().unwrap_or_else(|error| error.into_inner());
    for show in [
        "{{ ns.x == [1] }}",
        "{{ ns.x | length }}",
        "{{ ns.x in [ns.x] }}",
        "{{ ns.x | sort | length }}",
    ] {
        let _ = render(&format!("{nested}{show}"));
    }
}

#[test]
fn deep_recursion() {
    for source in [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(x) %}{{ f([x]) }}{% endmacro %}{{ f(1) }}",
        "{% macro f() %}{% call f() %}{% endcall %}{% endmacro %}{{ f() }}",
        "{% macro a() %}{{ b() }}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{{ a() }}{% endmacro %}{{ a() }}",
        "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
        "{% macro f() %}{% for x in [1] %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
        "{% macro f() %}{% generation %}{{ f() }}{% endgeneration %}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    ] {
        refused(source);
    }
    let many = 20_000;
    for source in [
        format!("{{{{ {}1{} }}}}", "(".repeat(many), ")".repeat(many)),
        format!("{{{{ {}{} }}}}", "[".repeat(many), "]".repeat(many)),
        format!("{{{{ {}1 }}}}", "-".repeat(many)),
        format!("{{{{ {}true }}}}", "not ".repeat(many)),
        format!("{}{}", "{% if true %}".repeat(many), "{% endif %}".repeat(many)),
        format!(
            "{}{}",
            "{% for a in [1] %}".repeat(many),
            "{% endfor %}".repeat(many)
        ),
        format!("{{{{ 'a'{} }}}}", ".b".repeat(many)),
        format!("{{{{ 1{} }}}}", " if 1 else 2".repeat(many)),
        format!("{{{{ 'a'{} }}}}", "|upper".repeat(many)),
        format!("{{{{ 1{} }}}}", " + 1".repeat(many)),
        format!("{{{{ 1{} }}}}", " ** 1".repeat(many)),
        format!("{{{{ 'a'{} }}}}", " ~ 'a'".repeat(many)),
    ] {
        let _alone = ALONE.lock().unwrap_or_else(|error| error.into_inner());
        let _ = render(&source);
    }
}

#[test]
fn huge_results() {
    for source in [
        "{{ 'x' * 10**9 }}",
        "{{ 10**9 * 'x' }}",
        "{{ [0] * 10**9 }}",
        "{{ ('x' * 10**6) * 10**6 }}",
        "{{ 'x' * 10**30 }}",
        "{{ 'x'.ljust(10**12) }}",
        "{{ 'x'.center(10**12) }}",
        "{{ '1'.zfill(10**12) }}",
        "{{ '{:>999999999999}'.format(1) }}",
        "{{ '{:999999999}{:999999999}'.format(1, 2) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '%.999999999f' | format(1.0) }}",
        "{{ 'x' | indent(10**10, true) }}",
        "{{ ('x' * 10**6).replace('', 'y' * 10**6) }}",
        "{{ ('x' * 10**6) | replace('x', 'y' * 10**6) }}",
        "{{ ('y' * 10**6).join(['x'] * 10**6) }}",
        "{{ (['x'] * 10**6) | join('y' * 10**6) }}",
        "{{ [1] | batch(10**10, 'x') | list }}",
        "{{ [1] | slice(10**10) | list }}",
        "{{ strftime_now('%c' * 10**6) }}",
        "{% for i in range(10**6) %}{{ messages[0].content * 1000 }}{% endfor %}",
        "{% set ns = namespace(l=[]) %}{% for i in range(10**6) %}{% set ns.l = ns.l + ['x' * 1000] %}{% endfor %}",
        "{{ dict.fromkeys(range(10**18), 1) }}",
        "{{ dict(range(10**18)) }}",
        "{{ 'a'.split('a', 10**18) | tojson * 10**9 }}",
    ] {
        refused(source);
    }
}

#[test]
fn no_way_out() {
    for source in [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__['os'] }}",
        "{{ raise_exception.__globals__.os.system('true') }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{% import '../x' as x %}",
        "{% extends '/etc/passwd' %}",
        "{{ open('/etc/passwd') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% set ns = namespace(__x=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ env.x.y }}",
        "{{ debug().x.y }}",
    ] {
        refused(source);
    }
}

/// Pieces of templates, to be put together at random.
fn piece() -> impl Strategy<Value = String> {
    let fixed = [
        "{{",
        "}}",
        "{%",
        "%}",
        "{%-",
        "-%}",
        "{#",
        "#}",
        "{% raw %}",
        "{% endraw %}",
        "{% generation %}",
        "{% endgeneration %}",
        "{% for x in ",
        "{% endfor %}",
        "{% if ",
        "{% else %}",
        "{% endif %}",
        "{% set ns.x = ",
        "{% set x = ",
        "{% set x %}",
        "{% endset %}",
        "{% macro f(a) %}",
        "{% endmacro %}",
        "{% call f(1) %}",
        "{% endcall %}",
        "{% break %}",
        "{% filter upper %}",
        "{% endfilter %}",
        "messages",
        "x",
        "f(x)",
        "loop.index",
        "namespace(x=1)",
        "range(9)",
        "strftime_now('%Y')",
        "raise_exception('x')",
        "| tojson",
        "| length",
        "| list",
        "| join(',')",
        "| map(attribute='role')",
        "| default('x')",
        "is defined",
        "is iterable",
        "in",
        "not",
        "and",
        "if",
        "else",
        "recursive",
        ".content",
        ".role",
        "[0]",
        "[1:]",
        "[::-1]",
        ".split('l')",
        ".replace('', 'é')",
        ".strip()",
        ".format(1)",
        ".items()",
        ".title()",
        ".center(9)",
        ".splitlines()",
        ".find('l', -2)",
        "'é'",
        "\"it's\"",
        "'{:>5}'",
        "1",
        "-1",
        "1.5",
        "1e300",
        "9223372036854775807",
        "10 ** 30",
        "none",
        "true",
        "+",
        "-",
        "*",
        "/",
        "//",
        "%",
        "**",
        "~",
        "==",
        "<",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        "=",
        ".",
        "|",
        "'",
        "\"",
        "\\",
        "\n",
        "\r\n",
        " ",
        "\u{2028}",
        "🙂",
    ];
    prop_oneof![
        9 => prop::sample::select(fixed.to_vec()).prop_map(str::to_owned),
        1 => "\\PC{0,6}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn any_template(pieces in prop::collection::vec(piece(), 0..24), spaced: bool) {
        let _alone = ALONE.lock().unwrap_or_else(|error| error.into_inner());
        let _ = render(&pieces.join(if spaced { " " } else { "" }));
    }

    #[test]
    fn any_expression(pieces in prop::collection::vec(piece(), 0..8)) {
        let _alone = ALONE.lock().unwrap_or_else(|error| error.into_inner());
        let _ = render(&format!("{{{{ {} }}}}", pieces.join(" ")));
    }

    #[test]
    fn any_text(text in any::<String>()) {
        let _alone = ALONE.lock().unwrap_or_else(|error| error.into_inner());
        let _ = render(&text);
        let _ = render(&format!("{{% {text} %}}{{{{ {text} }}}}"));
    }
}
