//! The part of Python's pickle that files of tensors need, and nothing else of it.
//!
//! No Python object is made and no function called: the few names that rebuild tensors are understood here,
//! and any other is refused by name. Memory is bounded by the length of the pickle: values are small and
//! refer to one table, texts are slices of the input, and copies are counted like opcodes.
//!
//! Sources: the opcodes in `Lib/pickletools.py` of CPython, the rebuilding functions in `torch/_utils.py`.

use std::collections::HashMap;

use super::DType;
use crate::{Error, Result};

/// Opcodes and copied items that one pickle may take; a state dict takes about forty for a tensor.
const MAX_WORK: usize = 1 << 22;

/// Containers nested deeper than this are no state dict.
const MAX_DEPTH: usize = 64;

/// The most dimensions that PyTorch gives a tensor.
const MAX_DIMS: usize = 64;

const CONVERT: &str = "nothing of it was run; if you trust the file, load it with torch in Python and save the state dict \
     with safetensors.torch.save_file";

/// A Python value. What can be shared or nested is a number of [`Pickle::nodes`].
#[derive(Debug, Clone, Copy)]
pub(super) enum Value<'a> {
    /// Bytes, floats and whatever else is of no use here.
    Opaque,
    None,
    Bool(bool),
    Int(i64),
    /// A whole number of more than 64 bits: little-endian, two's complement.
    Long(&'a [u8]),
    Text(&'a str),
    Global(Global),
    Storage(usize),
    Tensor(usize),
    Node(usize),
}

/// The names that a pickle may call.
#[derive(Debug, Clone, Copy)]
pub(super) enum Global {
    RebuildTensor,
    RebuildTensorV3,
    RebuildParameter,
    OrderedDict,
    Size,
    /// A storage class; `None` for bytes of no type.
    Storage(Option<DType>),
    DType(DType),
}

impl Global {
    fn named(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_tensor_v3") => Self::RebuildTensorV3,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch", "Size") => Self::Size,
            ("torch" | "torch.storage", "UntypedStorage") => Self::Storage(None),
            ("torch", "DoubleStorage") => Self::Storage(Some(DType::F64)),
            ("torch", "FloatStorage") => Self::Storage(Some(DType::F32)),
            ("torch", "HalfStorage") => Self::Storage(Some(DType::F16)),
            ("torch", "BFloat16Storage") => Self::Storage(Some(DType::BF16)),
            ("torch", "LongStorage") => Self::Storage(Some(DType::I64)),
            ("torch", "IntStorage") => Self::Storage(Some(DType::I32)),
            ("torch", "ShortStorage") => Self::Storage(Some(DType::I16)),
            ("torch", "CharStorage") => Self::Storage(Some(DType::I8)),
            ("torch", "ByteStorage") => Self::Storage(Some(DType::U8)),
            ("torch", "BoolStorage") => Self::Storage(Some(DType::Bool)),
            ("torch", "float64") => Self::DType(DType::F64),
            ("torch", "float32") => Self::DType(DType::F32),
            ("torch", "float16") => Self::DType(DType::F16),
            ("torch", "bfloat16") => Self::DType(DType::BF16),
            ("torch", "float8_e4m3fn") => Self::DType(DType::F8E4M3),
            ("torch", "float8_e5m2") => Self::DType(DType::F8E5M2),
            ("torch", "int64") => Self::DType(DType::I64),
            ("torch", "int32") => Self::DType(DType::I32),
            ("torch", "int16") => Self::DType(DType::I16),
            ("torch", "int8") => Self::DType(DType::I8),
            ("torch", "uint64") => Self::DType(DType::U64),
            ("torch", "uint32") => Self::DType(DType::U32),
            ("torch", "uint16") => Self::DType(DType::U16),
            ("torch", "uint8") => Self::DType(DType::U8),
            ("torch", "bool") => Self::DType(DType::Bool),
            _ => return None,
        })
    }
}

/// A container.
#[derive(Debug)]
pub(super) enum Node<'a> {
    Tuple(Vec<Value<'a>>),
    List(Vec<Value<'a>>),
    Set(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
}

impl<'a> Node<'a> {
    /// The values in it, without keys.
    fn values(&self) -> impl DoubleEndedIterator<Item = Value<'a>> + '_ {
        let (items, pairs): (&[Value], &[(Value, Value)]) = match self {
            Self::Tuple(items) | Self::List(items) | Self::Set(items) => (items, &[]),
            Self::Dict(pairs) => (&[], pairs),
        };
        items.iter().copied().chain(pairs.iter().map(|(_, value)| *value))
    }
}

/// Names bytes that lie outside of the pickle.
#[derive(Debug)]
pub(super) struct Storage<'a> {
    pub(super) key: &'a str,
    /// `None` for bytes of no type.
    pub(super) dtype: Option<DType>,
    /// Number of elements, of bytes where there is no type.
    pub(super) len: usize,
    /// Where a view begins in the storage of that key, in elements.
    pub(super) offset: usize,
}

/// A tensor as the pickle describes it; nothing of this is checked against the storage.
#[derive(Debug)]
pub(super) struct Tensor {
    /// A number of [`Pickle::storages`].
    pub(super) storage: usize,
    pub(super) dtype: DType,
    /// In elements.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    /// In elements.
    pub(super) strides: Vec<usize>,
}

/// What a pickle describes. Free of cycles, and not deeply nested.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    pub(super) root: Value<'a>,
    pub(super) nodes: Vec<Node<'a>>,
    pub(super) storages: Vec<Storage<'a>>,
    pub(super) tensors: Vec<Tensor>,
    /// For every node, whether there are tensors in it.
    with_tensors: Vec<bool>,
}

impl<'a> Pickle<'a> {
    /// Reads the pickle at `at`, and moves `at` behind it.
    ///
    /// # Errors
    /// Where the pickle is broken or names something that does not rebuild tensors.
    pub(super) fn read(bytes: &'a [u8], at: &mut usize, file: &str) -> Result<Self> {
        let mut machine = Machine {
            file,
            bytes,
            at: *at,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            nodes: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
            work: 0,
        };
        let root = loop {
            if let Some(root) = machine.step()? {
                break root;
            }
        };
        *at = machine.at;
        let with_tensors = survey(root, &machine.nodes).map_err(|what| Error::format(file, what))?;
        Ok(Self {
            root,
            nodes: machine.nodes,
            storages: machine.storages,
            tensors: machine.tensors,
            with_tensors,
        })
    }

    /// Whether there are tensors in a value.
    pub(super) fn holds_tensors(&self, value: Value) -> bool {
        match value {
            Value::Tensor(_) => true,
            Value::Node(node) => self.with_tensors[node],
            _ => false,
        }
    }
}

/// Refuses cycles and deep nesting in what `root` reaches, and finds the nodes that hold tensors.
fn survey(root: Value, nodes: &[Node]) -> std::result::Result<Vec<bool>, String> {
    #[derive(Clone, Copy, PartialEq)]
    enum Seen {
        No,
        Open,
        /// With the number of containers below.
        Done(usize),
    }
    let mut seen = vec![Seen::No; nodes.len()];
    let mut found = vec![false; nodes.len()];
    let Value::Node(root) = root else {
        return Ok(found);
    };
    // A node is met twice: on the way down, and when all that is in it is done.
    let mut todo = vec![root];
    while let Some(&node) = todo.last() {
        match seen[node] {
            Seen::No => {
                seen[node] = Seen::Open;
                for value in nodes[node].values() {
                    match value {
                        Value::Node(inner) if seen[inner] == Seen::Open => {
                            return Err("the pickle holds a container that contains itself".to_string());
                        }
                        Value::Node(inner) if seen[inner] == Seen::No => todo.push(inner),
                        _ => {}
                    }
                }
            }
            Seen::Open => {
                let mut depth = 0;
                for value in nodes[node].values() {
                    if let Value::Node(inner) = value {
                        found[node] |= found[inner];
                        if let Seen::Done(below) = seen[inner] {
                            depth = depth.max(below + 1);
                        }
                    }
                    found[node] |= matches!(value, Value::Tensor(_));
                }
                if depth > MAX_DEPTH {
                    return Err(format!("the pickle nests more than {MAX_DEPTH} containers"));
                }
                seen[node] = Seen::Done(depth);
                todo.pop();
            }
            // Put down twice before it was met.
            Seen::Done(_) => {
                todo.pop();
            }
        }
    }
    Ok(found)
}

struct Machine<'a, 'f> {
    file: &'f str,
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    /// Heights of the stack; nothing below the last one can be popped.
    marks: Vec<usize>,
    memo: HashMap<u64, Value<'a>>,
    nodes: Vec<Node<'a>>,
    storages: Vec<Storage<'a>>,
    tensors: Vec<Tensor>,
    work: usize,
}

impl<'a> Machine<'a, '_> {
    /// One opcode; the result of the pickle when it was the last.
    fn step(&mut self) -> Result<Option<Value<'a>>> {
        self.charge(1)?;
        let [opcode] = self.array()?;
        let value = match opcode {
            b'.' => return self.pop().map(Some),
            // PROTO, FRAME
            0x80 => {
                let [version] = self.array()?;
                if version > 5 {
                    return Err(self.bad(format!("protocol {version} is unknown")));
                }
                return Ok(None);
            }
            0x95 => {
                self.array::<8>()?;
                return Ok(None);
            }

            // The stack and the memo.
            b'(' => {
                self.marks.push(self.stack.len());
                return Ok(None);
            }
            b'0' => {
                self.pop()?;
                return Ok(None);
            }
            b'1' => {
                self.pop_mark()?;
                return Ok(None);
            }
            b'2' => self.top()?,
            b'q' => return self.remember(|machine| machine.array().map(|[n]: [u8; 1]| n.into())),
            b'r' => return self.remember(|machine| machine.array().map(|n| u32::from_le_bytes(n).into())),
            b'p' => return self.remember(|machine| machine.line_number()),
            0x94 => return self.remember(|machine| Ok(machine.memo.len() as u64)),
            b'h' => {
                let [n] = self.array()?;
                self.recall(n.into())?
            }
            b'j' => {
                let n = u32::from_le_bytes(self.array()?);
                self.recall(n.into())?
            }
            b'g' => {
                let n = self.line_number()?;
                self.recall(n)?
            }

            // Plain values.
            b'N' => Value::None,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'J' => Value::Int(i32::from_le_bytes(self.array()?).into()),
            b'K' => Value::Int(self.array::<1>()?[0].into()),
            b'M' => Value::Int(u16::from_le_bytes(self.array()?).into()),
            b'I' => match self.line()? {
                "00" => Value::Bool(false),
                "01" => Value::Bool(true),
                text => self.decimal(text)?,
            },
            b'L' => {
                let text = self.line()?;
                self.decimal(text.strip_suffix('L').unwrap_or(text))?
            }
            0x8a => {
                let [len] = self.array()?;
                long(self.take(len.into())?)
            }
            0x8b => {
                let len = u32::from_le_bytes(self.array()?);
                long(self.take(len.into())?)
            }
            b'G' => {
                self.array::<8>()?;
                Value::Opaque
            }
            b'F' => {
                self.line()?;
                Value::Opaque
            }
            0x8c => {
                let [len] = self.array()?;
                self.text(len.into())?
            }
            b'X' => {
                let len = u32::from_le_bytes(self.array()?);
                self.text(len.into())?
            }
            0x8d => {
                let len = u64::from_le_bytes(self.array()?);
                self.text(len)?
            }
            // The texts of Python 2, which may be bytes as well.
            b'U' => {
                let [len] = self.array()?;
                std::str::from_utf8(self.take(len.into())?).map_or(Value::Opaque, Value::Text)
            }
            b'T' => {
                let len = u32::from_le_bytes(self.array()?);
                std::str::from_utf8(self.take(len.into())?).map_or(Value::Opaque, Value::Text)
            }
            b'C' => {
                let [len] = self.array()?;
                self.take(len.into())?;
                Value::Opaque
            }
            b'B' => {
                let len = u32::from_le_bytes(self.array()?);
                self.take(len.into())?;
                Value::Opaque
            }
            0x8e | 0x96 => {
                let len = u64::from_le_bytes(self.array()?);
                self.take(len)?;
                Value::Opaque
            }

            // Containers.
            b')' => self.node(Node::Tuple(Vec::new())),
            0x85..=0x87 => {
                let len = usize::from(opcode - 0x84);
                let from = self
                    .stack
                    .len()
                    .checked_sub(len)
                    .filter(|from| *from >= self.floor());
                let from = from.ok_or_else(|| self.empty())?;
                let items = self.stack.split_off(from);
                self.node(Node::Tuple(items))
            }
            b't' => {
                let items = self.pop_mark()?;
                self.node(Node::Tuple(items))
            }
            b']' => self.node(Node::List(Vec::new())),
            b'l' => {
                let items = self.pop_mark()?;
                self.node(Node::List(items))
            }
            b'a' => {
                let item = self.pop()?;
                return self.extend(vec![item]);
            }
            b'e' => {
                let items = self.pop_mark()?;
                return self.extend(items);
            }
            b'}' => self.node(Node::Dict(Vec::new())),
            b'd' => {
                let items = self.pop_mark()?;
                let pairs = self.pairs(items)?;
                self.node(Node::Dict(pairs))
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                return self.extend(vec![key, value]);
            }
            b'u' => {
                let items = self.pop_mark()?;
                return self.extend(items);
            }
            0x8f => self.node(Node::Set(Vec::new())),
            0x90 => {
                let items = self.pop_mark()?;
                return self.extend(items);
            }
            0x91 => {
                let items = self.pop_mark()?;
                self.node(Node::Set(items))
            }

            // Names, calls and what lies outside.
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?
            }
            0x93 => match (self.pop()?, self.pop()?) {
                (Value::Text(name), Value::Text(module)) => self.global(module, name)?,
                _ => return Err(self.bad("a global without a name")),
            },
            // INST names its class in the same way; there is none that could be wanted.
            b'i' => {
                let (module, name) = (self.line()?, self.line()?);
                return Err(self.refuse(module, name));
            }
            b'R' => {
                let args = self.pop()?;
                match self.pop()? {
                    Value::Global(function) => self.reduce(function, args)?,
                    _ => return Err(self.bad("a call of something that is no function")),
                }
            }
            // The state of an ordered dict is a note on versions: of no use here.
            b'b' => {
                self.pop()?;
                match self.top()? {
                    Value::Node(node) if matches!(self.nodes[node], Node::Dict(_)) => return Ok(None),
                    _ => return Err(self.bad("a state for something that has none")),
                }
            }
            b'Q' => {
                let id = self.pop()?;
                self.persistent(id)?
            }
            other => {
                return Err(Error::unsupported(
                    self.file,
                    format!("the pickle opcode {other:#04x} at byte {}", self.at - 1),
                    CONVERT,
                ));
            }
        };
        self.stack.push(value);
        Ok(None)
    }

    fn bad(&self, what: impl std::fmt::Display) -> Error {
        Error::format(
            self.file,
            format!("broken pickle before byte {}: {what}", self.at),
        )
    }

    fn empty(&self) -> Error {
        self.bad("an opcode finds too few values")
    }

    fn charge(&mut self, work: usize) -> Result<()> {
        self.work = self.work.saturating_add(work);
        if self.work > MAX_WORK {
            return Err(self.bad(format!("more than {MAX_WORK} steps: this is no state dict")));
        }
        Ok(())
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        match usize::try_from(len).ok().and_then(|len| rest.get(..len)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => Err(self.bad(format!("{len} bytes are wanted and {} are left", rest.len()))),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn text(&mut self, len: u64) -> Result<Value<'a>> {
        match std::str::from_utf8(self.take(len)?) {
            Ok(text) => Ok(Value::Text(text)),
            Err(_) => Err(self.bad("a text is not UTF-8")),
        }
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|byte| *byte == b'\n');
        let line = end.and_then(|end| std::str::from_utf8(&rest[..end]).ok());
        let line = line.ok_or_else(|| self.bad("a line of text was expected"))?;
        self.at += line.len() + 1;
        Ok(line)
    }

    fn line_number(&mut self) -> Result<u64> {
        let line = self.line()?;
        line.parse().map_err(|_| self.bad("a number was expected"))
    }

    fn decimal(&self, text: &str) -> Result<Value<'a>> {
        let number = text.trim().parse();
        number
            .map(Value::Int)
            .map_err(|_| self.bad("a whole number was expected"))
    }

    /// The height of the stack that an opcode may not go below.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Result<Value<'a>> {
        match self.stack.last() {
            Some(value) if self.stack.len() > self.floor() => Ok(*value),
            _ => Err(self.empty()),
        }
    }

    fn pop(&mut self) -> Result<Value<'a>> {
        let value = self.top()?;
        self.stack.pop();
        Ok(value)
    }

    fn pop_mark(&mut self) -> Result<Vec<Value<'a>>> {
        let mark = self.marks.pop().ok_or_else(|| self.bad("a mark is missing"))?;
        Ok(self.stack.split_off(mark))
    }

    fn remember(&mut self, key: impl FnOnce(&mut Self) -> Result<u64>) -> Result<Option<Value<'a>>> {
        let key = key(self)?;
        let value = self.top()?;
        self.memo.insert(key, value);
        Ok(None)
    }

    fn recall(&self, key: u64) -> Result<Value<'a>> {
        let value = self.memo.get(&key).copied();
        value.ok_or_else(|| self.bad(format!("the memo has no entry {key}")))
    }

    fn node(&mut self, node: Node<'a>) -> Value<'a> {
        self.nodes.push(node);
        Value::Node(self.nodes.len() - 1)
    }

    fn pairs(&self, items: Vec<Value<'a>>) -> Result<Vec<(Value<'a>, Value<'a>)>> {
        match items.as_chunks() {
            (pairs, []) => Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect()),
            _ => Err(self.bad("a key without a value")),
        }
    }

    /// Adds to the container on top of the stack; keys and values alternate for a dict.
    fn extend(&mut self, items: Vec<Value<'a>>) -> Result<Option<Value<'a>>> {
        let Value::Node(node) = self.top()? else {
            return Err(self.bad("items for something that is no container"));
        };
        match &self.nodes[node] {
            Node::Dict(_) => {
                let new = self.pairs(items)?;
                if let Node::Dict(pairs) = &mut self.nodes[node] {
                    pairs.extend(new);
                }
            }
            Node::Tuple(_) => return Err(self.bad("items for a tuple")),
            Node::List(_) | Node::Set(_) => {
                if let Node::List(all) | Node::Set(all) = &mut self.nodes[node] {
                    all.extend(items);
                }
            }
        }
        Ok(None)
    }

    fn refuse(&self, module: &str, name: &str) -> Error {
        let shown: String = format!("{module}.{name}").escape_debug().take(200).collect();
        Error::unsupported(
            self.file,
            format!("the Python object `{shown}` in a pickle"),
            CONVERT,
        )
    }

    fn global(&self, module: &str, name: &str) -> Result<Value<'a>> {
        match Global::named(module, name) {
            Some(global) => Ok(Value::Global(global)),
            None => Err(self.refuse(module, name)),
        }
    }

    fn tuple(&self, value: Value<'a>) -> Option<&[Value<'a>]> {
        match value {
            Value::Node(node) => match &self.nodes[node] {
                Node::Tuple(items) => Some(items),
                _ => None,
            },
            _ => None,
        }
    }

    /// A tuple of sizes.
    fn sizes(&self, value: Value<'a>) -> Option<Vec<usize>> {
        let items = self.tuple(value).filter(|items| items.len() <= MAX_DIMS)?;
        items.iter().map(|item| size(*item)).collect()
    }

    fn reduce(&mut self, function: Global, args: Value<'a>) -> Result<Value<'a>> {
        let Some(args) = self.tuple(args) else {
            return Err(self.bad("the arguments of a call are no tuple"));
        };
        let rebuilt = match (function, args) {
            // (storage, offset, shape, strides, requires_grad, hooks, metadata), and the type before the last.
            (Global::RebuildTensor, [storage, offset, shape, strides, ..]) => {
                self.tensor(*storage, *offset, *shape, *strides, None)
            }
            (
                Global::RebuildTensorV3,
                [
                    storage,
                    offset,
                    shape,
                    strides,
                    _,
                    _,
                    Value::Global(Global::DType(dtype)),
                    ..,
                ],
            ) => self.tensor(*storage, *offset, *shape, *strides, Some(*dtype)),
            (Global::RebuildParameter, [tensor @ Value::Tensor(_), ..]) => return Ok(*tensor),
            (Global::Size, [shape @ Value::Node(_)]) => return Ok(*shape),
            (Global::OrderedDict, []) => return Ok(self.node(Node::Dict(Vec::new()))),
            (Global::OrderedDict, [Value::Node(items)]) => {
                let items = *items;
                return self.ordered_dict(items);
            }
            _ => None,
        };
        match rebuilt {
            Some(tensor) => {
                self.charge(2 * tensor.shape.len())?;
                self.tensors.push(tensor);
                Ok(Value::Tensor(self.tensors.len() - 1))
            }
            None => Err(self.bad(format!(
                "{function:?} is called with other arguments than it takes"
            ))),
        }
    }

    fn tensor(
        &self,
        storage: Value<'a>,
        offset: Value<'a>,
        shape: Value<'a>,
        strides: Value<'a>,
        dtype: Option<DType>,
    ) -> Option<Tensor> {
        let Value::Storage(storage) = storage else {
            return None;
        };
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        (shape.len() == strides.len()).then_some(())?;
        Some(Tensor {
            storage,
            dtype: dtype.or(self.storages[storage].dtype)?,
            offset: size(offset)?,
            shape,
            strides,
        })
    }

    /// A dict from a list of pairs, as Python 2 wrote it.
    fn ordered_dict(&mut self, items: usize) -> Result<Value<'a>> {
        let len = self.nodes[items].values().count();
        self.charge(len)?;
        let mut pairs = Vec::with_capacity(len);
        for item in self.nodes[items].values() {
            let pair = match item {
                Value::Node(pair) => match &self.nodes[pair] {
                    Node::Tuple(pair) | Node::List(pair) => pair.as_slice(),
                    _ => &[],
                },
                _ => &[],
            };
            match pair {
                [key, value] => pairs.push((*key, *value)),
                _ => return Err(self.bad("a dict is made of something that is no pair")),
            }
        }
        Ok(self.node(Node::Dict(pairs)))
    }

    /// `("storage", class, key, location, len[, (view key, offset, len) or None])`.
    fn persistent(&mut self, id: Value<'a>) -> Result<Value<'a>> {
        let storage = match self.tuple(id) {
            Some(
                [
                    Value::Text("storage"),
                    Value::Global(Global::Storage(dtype)),
                    Value::Text(key),
                    _,
                    len,
                    rest @ ..,
                ],
            ) => size(*len).and_then(|len| {
                let (offset, len) = match rest {
                    [] | [Value::None] => (0, len),
                    [view] => match self.tuple(*view)? {
                        [_, offset, len] => (size(*offset)?, size(*len)?),
                        _ => return None,
                    },
                    _ => return None,
                };
                Some(Storage {
                    key,
                    dtype: *dtype,
                    len,
                    offset,
                })
            }),
            Some([Value::Text("module"), ..]) => {
                return Err(Error::unsupported(
                    self.file,
                    "a pickled module with its source code",
                    CONVERT,
                ));
            }
            _ => None,
        };
        let storage = storage.ok_or_else(|| self.bad("a persistent id names no storage"))?;
        self.storages.push(storage);
        Ok(Value::Storage(self.storages.len() - 1))
    }
}

fn size(value: Value) -> Option<usize> {
    match value {
        Value::Int(n) => usize::try_from(n).ok(),
        _ => None,
    }
}

/// Little-endian two's complement of any length.
fn long(bytes: &[u8]) -> Value<'_> {
    if bytes.len() > 8 {
        return Value::Long(bytes);
    }
    let sign = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut full = [if sign { 0xff } else { 0 }; 8];
    full[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(full))
}
