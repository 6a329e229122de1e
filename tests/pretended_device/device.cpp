// A device over CPU memory that follows the rules of CUDA which a CPU does not have. `__init__.py` says which.
//
// torch sends every operator of the device to `run_on_host`, which checks the rules, runs the operator of the CPU on the
// same memory, and moves new tensors onto the device.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <set>
#include <string>

namespace {

namespace py = pybind11;
using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

constexpr auto DEVICE = c10::DeviceType::PrivateUse1;
const c10::Device ONLY_DEVICE(DEVICE, 0);

// -- what is told ------------------------------------------------------------------------------------------------------

py::object* listener = nullptr;

// Tell Python of a "copy in", a "copy out" or a "wait". An exception of the listener passes through torch to the caller.
void tell(const char* kind, const std::string& what, int64_t num_bytes) {
  if (!listener) return;
  py::gil_scoped_acquire gil;
  (*listener)(kind, what, num_bytes);
}

// -- memory ------------------------------------------------------------------------------------------------------------

struct Allocator final : c10::Allocator {
  // Neither zero nor a small number: whoever reads memory before it is written gets a wrong result.
  static constexpr int GARBAGE = 0x7f;

  c10::DataPtr allocate(size_t num_bytes) override {
    void* memory = malloc(num_bytes ? num_bytes : 1);
    memset(memory, GARBAGE, num_bytes);
    return {memory, memory, &free, ONLY_DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* target, const void* source, size_t num_bytes) const override {
    default_copy_data(target, source, num_bytes);
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(DEVICE, &allocator);

// One device, one stream, and nothing on it is asynchronous.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream only_stream() { return c10::Stream(c10::Stream::DEFAULT, ONLY_DEVICE); }

  c10::DeviceType type() const override { return DEVICE; }
  c10::Device exchangeDevice(c10::Device) const override { return ONLY_DEVICE; }
  c10::Device getDevice() const override { return ONLY_DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return only_stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return only_stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return only_stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<at::CPUGeneratorImpl>(c10::default_rng_seed_val);
  }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t num_bytes) const override {
    auto memory = allocator.allocate(num_bytes);
    memcpy(memory.get(), storage.data(), std::min(num_bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
    storage.unsafeGetStorageImpl()->set_nbytes(num_bytes);
  }
};

bool is_on_device(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == DEVICE; }

// The same memory as a tensor of the CPU.
Tensor view_on_host(const Tensor& tensor) {
  if (!is_on_device(tensor)) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(c10::kCPU));
}

Tensor make_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(sizes, strides, &allocator, keys, c10::dtype_or_default(dtype));
}

Tensor make_empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                  std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(sizes, &allocator, keys, c10::dtype_or_default(dtype), format);
}

// A result of the CPU, as a new tensor of the device.
Tensor move_to_device(const Tensor& result) {
  if (!result.defined()) return result;
  auto moved = make_strided(result.sizes(), result.strides(), result.scalar_type(), {}, {}, {});
  view_on_host(moved).copy_(result);
  return moved;
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  if (is_on_device(source) != is_on_device(target)) {
    const char* kind = is_on_device(target) ? "copy in" : "copy out";
    tell(kind, non_blocking ? "non-blocking" : "blocking", source.nbytes());
  }
  view_on_host(target).copy_(view_on_host(source));
  return target;
}

const Tensor& resize_in_place(const Tensor& tensor, at::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  auto* implementation = tensor.unsafeGetTensorImpl();
  auto num_elements = c10::multiply_integers(sizes) + implementation->storage_offset();
  auto num_bytes = static_cast<size_t>(tensor.itemsize() * num_elements);
  if (implementation->storage().nbytes() < num_bytes) {
    Hooks().resizePrivateUse1Bytes(implementation->storage(), num_bytes);
  }
  implementation->set_sizes_contiguous(sizes);
  return tensor;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  resize_in_place(target, source.sizes(), {});
  return copy_from(source, target, false);
}

at::Scalar read_scalar(const Tensor& tensor) {
  tell("wait", "item", tensor.nbytes());
  return view_on_host(tensor).item();
}

Tensor view(const Tensor& tensor, at::IntArrayRef sizes) { return at::native::view(tensor, sizes); }

Tensor as_strided(const Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(tensor, sizes, strides, offset);
}

Tensor reshape_alias(const Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides) {
  return at::native::_reshape_alias(tensor, sizes, strides);
}

Tensor unfold(const Tensor& tensor, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(tensor, dim, size, step);
}

Tensor& set_storage_view(Tensor& tensor, at::Storage storage, int64_t offset, at::IntArrayRef sizes,
                         at::IntArrayRef strides) {
  return at::native::set_storage_cpu_(tensor, storage, offset, sizes, strides);
}

Tensor& set_storage(Tensor& tensor, at::Storage storage) {
  auto num_elements = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return at::native::set_storage_cpu_(tensor, storage, 0, {num_elements}, {});
}

Tensor& set_tensor(Tensor& tensor, const Tensor& source) {
  return at::native::set_storage_cpu_(tensor, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// -- TF32 --------------------------------------------------------------------------------------------------------------

// float32 with the 10 bits of mantissa that TF32 has, to nearest.
Tensor round_to_tf32(const Tensor& values) {
  if (!values.defined() || values.scalar_type() != at::kFloat) return values;
  constexpr int32_t HALF_OF_LAST_BIT = 0x1000;
  constexpr int32_t CLEAR_13_BITS = ~0x1fff;
  auto bits = values.contiguous().view(at::kInt);
  return at::bitwise_and(bits + HALF_OF_LAST_BIT, CLEAR_13_BITS).view(at::kFloat);
}

Tensor prepare_conv_operand(const Tensor& tensor) {
  auto values = view_on_host(tensor);
  return at::globalContext().allowTF32CuDNN(at::Float32Op::CONV) ? round_to_tf32(values) : values;
}

// -- convolution: torch has two operators for devices of this kind -----------------------------------------------------

Tensor convolve(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
                at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                int64_t groups) {
  auto bias_tensor = bias.value_or(Tensor());
  bool together = input.device() == weight.device() && (!bias_tensor.defined() || is_on_device(bias_tensor));
  TORCH_CHECK(together, "Expected all tensors to be on the same device, found two in a convolution");
  TORCH_CHECK(input.scalar_type() == weight.scalar_type(), "Input type and weight type should be the same");
  return move_to_device(at::convolution(prepare_conv_operand(input), prepare_conv_operand(weight),
                                        view_on_host(bias_tensor), stride, padding, dilation, transposed,
                                        output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolve_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                     at::IntArrayRef stride, at::IntArrayRef padding,
                                                     at::IntArrayRef dilation, bool transposed,
                                                     at::IntArrayRef output_padding, int64_t groups,
                                                     std::array<bool, 3> needed) {
  std::vector<int64_t> bias_sizes{transposed ? weight.size(1) * groups : weight.size(0)};
  auto [grad_input, grad_weight, grad_bias] = at::convolution_backward(
      prepare_conv_operand(grad), prepare_conv_operand(input), prepare_conv_operand(weight), bias_sizes, stride, padding,
      dilation, transposed, output_padding, groups, needed);
  return {move_to_device(grad_input), move_to_device(grad_weight), move_to_device(grad_bias)};
}

// -- operators that a CPU does not have --------------------------------------------------------------------------------

Tensor add_bias(const Tensor& gates, const std::optional<Tensor>& bias) {
  auto values = view_on_host(gates);
  return bias && bias->defined() ? values + view_on_host(*bias) : values;
}

// As on CUDA, the workspace of a cell holds what its gradient needs: of an LSTM the activated gates.
std::tuple<Tensor, Tensor, Tensor> run_lstm_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& cell,
                                                 const std::optional<Tensor>& input_bias,
                                                 const std::optional<Tensor>& hidden_bias) {
  auto sums = (add_bias(input_gates, input_bias) + add_bias(hidden_gates, hidden_bias)).chunk(4, 1);
  auto in = sums[0].sigmoid(), forget = sums[1].sigmoid(), proposal = sums[2].tanh(), out = sums[3].sigmoid();
  auto new_cell = forget * view_on_host(cell) + in * proposal;
  auto hidden = out * new_cell.tanh();
  return {move_to_device(hidden), move_to_device(new_cell), move_to_device(at::cat({in, forget, proposal, out}, 1))};
}

std::tuple<Tensor, Tensor, Tensor> run_lstm_cell_backward(const std::optional<Tensor>& grad_hidden,
                                                          const std::optional<Tensor>& grad_new_cell, const Tensor& cell,
                                                          const Tensor& new_cell, const Tensor& workspace, bool has_bias) {
  auto gates = view_on_host(workspace).chunk(4, 1);
  auto in = gates[0], forget = gates[1], proposal = gates[2], out = gates[3];
  auto squashed = view_on_host(new_cell).tanh();
  auto zero = at::zeros_like(squashed);
  auto grad_h = grad_hidden && grad_hidden->defined() ? view_on_host(*grad_hidden) : zero;
  auto grad_c = grad_new_cell && grad_new_cell->defined() ? view_on_host(*grad_new_cell) : zero;
  grad_c = grad_c + grad_h * out * (1 - squashed * squashed);
  auto grad_gates = at::cat({grad_c * proposal * in * (1 - in), grad_c * view_on_host(cell) * forget * (1 - forget),
                             grad_c * in * (1 - proposal * proposal), grad_h * squashed * out * (1 - out)},
                            1);
  auto grad_bias = has_bias ? move_to_device(grad_gates.sum(0)) : Tensor();
  return {move_to_device(grad_gates), move_to_device(grad_c * forget), grad_bias};
}

std::tuple<Tensor, Tensor> run_gru_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& hidden,
                                        const std::optional<Tensor>& input_bias,
                                        const std::optional<Tensor>& hidden_bias) {
  auto from_input = add_bias(input_gates, input_bias).chunk(3, 1);
  auto from_hidden = add_bias(hidden_gates, hidden_bias).chunk(3, 1);
  auto reset = (from_input[0] + from_hidden[0]).sigmoid();
  auto update = (from_input[1] + from_hidden[1]).sigmoid();
  auto proposal = (from_input[2] + reset * from_hidden[2]).tanh();
  auto former = view_on_host(hidden);
  auto workspace = at::cat({reset, update, proposal, former, from_hidden[2]}, 1);
  return {move_to_device(proposal + update * (former - proposal)), move_to_device(workspace)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_gru_cell_backward(const Tensor& grad_hidden, const Tensor& workspace,
                                                                         bool has_bias) {
  auto saved = view_on_host(workspace).chunk(5, 1);
  auto reset = saved[0], update = saved[1], proposal = saved[2], former = saved[3], from_hidden = saved[4];
  auto grad = view_on_host(grad_hidden);
  auto grad_proposal = grad * (1 - update) * (1 - proposal * proposal);
  auto grad_update = grad * (former - proposal) * update * (1 - update);
  auto grad_reset = grad_proposal * from_hidden * reset * (1 - reset);
  auto grad_input_gates = at::cat({grad_reset, grad_update, grad_proposal}, 1);
  auto grad_hidden_gates = at::cat({grad_reset, grad_update, grad_proposal * reset}, 1);
  auto sum = [&](const Tensor& gates) { return has_bias ? move_to_device(gates.sum(0)) : Tensor(); };
  return {move_to_device(grad_input_gates), move_to_device(grad_hidden_gates), move_to_device(grad * update),
          sum(grad_input_gates), sum(grad_hidden_gates)};
}

// Of floats it is the operator of the CPU; the CPU has none of integers.
Tensor count_in_bins(const Tensor& values, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  if (!at::isFloatingType(values.scalar_type())) {
    return move_to_device(at::histc(view_on_host(values).to(at::kDouble), bins, low, high).to(values.scalar_type()));
  }
  at::globalContext().alertNotDeterministic("histc of floats");
  return move_to_device(at::histc(view_on_host(values), bins, low, high));
}

// -- every other operator ----------------------------------------------------------------------------------------------

const std::set<std::string> WAITING{
    "aten::_linalg_check_errors", "aten::_unique2",     "aten::bincount",    "aten::equal",
    "aten::is_nonzero",           "aten::masked_select", "aten::nonzero",     "aten::repeat_interleave",
    "aten::unique_consecutive",   "aten::unique_dim"};
const std::set<std::string> MATRIX_PRODUCTS{"aten::addbmm", "aten::addmm", "aten::baddbmm", "aten::bmm", "aten::mm"};
const std::set<std::string> NONDETERMINISTIC_FOR_FLOATS{"aten::cumsum", "aten::kthvalue", "aten::put_"};

bool takes_index_of_cpu(const std::string& name) {
  return name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" ||
         name == "aten::_index_put_impl_";
}

// Calls a function with every tensor of a value, which may be a list of tensors.
template <typename Function>
void for_each_tensor(const IValue& value, const Function& function) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) function(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& tensor : value.toTensorVector()) function(tensor);
  } else if (value.isOptionalTensorList()) {
    for (const auto& tensor : value.toOptionalTensorVector()) {
      if (tensor && tensor->defined()) function(*tensor);
    }
  }
}

// A value with every tensor replaced by the result of a function.
template <typename Function>
IValue map_tensors(const IValue& value, const Function& function) {
  if (value.isTensor()) {
    return value.toTensor().defined() ? IValue(function(value.toTensor())) : value;
  }
  if (value.isTensorList()) {
    c10::List<Tensor> tensors;
    for (const Tensor& tensor : value.toTensorVector()) tensors.push_back(function(tensor));
    return tensors;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> tensors;
    for (const auto& tensor : value.toOptionalTensorVector()) {
      bool is_tensor = tensor && tensor->defined();
      tensors.push_back(is_tensor ? std::optional<Tensor>(function(*tensor)) : tensor);
    }
    return tensors;
  }
  return value;
}

// CUDA takes a tensor of the CPU as a number if it has no dimension, but not where a kernel reads it by its address.
void require_one_device(const c10::FunctionSchema& schema, const std::vector<IValue>& arguments) {
  if (takes_index_of_cpu(schema.name())) return;
  bool reads_address = schema.name().find("fake_quantize") != std::string::npos;
  bool has_device = false;
  std::string stranger;
  for (size_t i = 0; i < arguments.size(); i++) {
    for_each_tensor(arguments[i], [&](const Tensor& tensor) {
      has_device |= is_on_device(tensor);
      if (tensor.device().is_cpu() && (tensor.dim() > 0 || reads_address)) {
        stranger = schema.arguments()[i].name() + c10::str(tensor.sizes());
      }
    });
  }
  TORCH_CHECK(!has_device || stranger.empty(), "Expected all tensors to be on the same device, but ", stranger, " of ",
              schema.name(), " is on cpu");
}

void tell_of_wait(const c10::FunctionSchema& schema, const std::vector<IValue>& arguments) {
  bool waits = WAITING.count(schema.name()) > 0;
  if (schema.name() == "aten::fake_quantize_per_channel_affine_cachemask") {
    waits |= !arguments[2].toTensor().is_floating_point();  // it reads integer zero points to check them
  }
  if (takes_index_of_cpu(schema.name())) {
    for_each_tensor(arguments[1], [&](const Tensor& index) {
      waits |= index.scalar_type() == at::kBool;  // how many elements it selects is known on the device only
      if (index.device().is_cpu()) tell("copy in", "index", index.nbytes());
    });
  }
  if (waits) tell("wait", schema.name(), 0);
}

void require_deterministic(const c10::FunctionSchema& schema, const std::vector<IValue>& arguments) {
  bool is_float = arguments[0].isTensor() && arguments[0].toTensor().defined() && arguments[0].toTensor().is_floating_point();
  if (is_float && NONDETERMINISTIC_FOR_FLOATS.count(schema.name())) at::globalContext().alertNotDeterministic(schema.name());
}

bool divides_by_number(const c10::FunctionSchema& schema, const std::vector<IValue>& arguments) {
  bool divides = schema.name() == "aten::div" || schema.name() == "aten::div_";
  bool is_exact = schema.overload_name() == "Tensor" || schema.overload_name() == "out";
  if (!divides || !is_exact) return false;
  auto divisor = arguments[1].toTensor();
  return divisor.device().is_cpu() && divisor.dim() == 0 && arguments[0].toTensor().is_floating_point();
}

// CUDA multiplies by the reciprocal of a number, which rounds twice.
Tensor multiply_by_reciprocal(const c10::FunctionSchema& schema, const std::vector<IValue>& arguments) {
  auto dividend = arguments[0].toTensor();
  auto dtype = dividend.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto product = at::mul(view_on_host(dividend), arguments[1].toTensor().to(dtype).reciprocal());
  if (schema.overload_name() == "out") return arguments[2].toTensor().resize_(product.sizes()).copy_(move_to_device(product));
  if (schema.name() == "aten::div_") return dividend.copy_(move_to_device(product));
  return move_to_device(product);
}

// Where an operator has written into a tensor of the CPU, and that grew out of the memory that it shares.
void write_back(const Tensor& written, const Tensor& target) {
  if (written.data_ptr() == target.data_ptr() && written.sizes() == target.sizes()) return;
  resize_in_place(target, written.sizes(), {});
  target.unsafeGetTensorImpl()->set_sizes_and_strides(written.sizes(), written.strides());
  view_on_host(target).copy_(written);
}

void run_on_host(const c10::OperatorHandle& handle, Stack* stack) {
  const auto& schema = handle.schema();
  auto num_arguments = schema.arguments().size();
  std::vector<IValue> arguments(stack->end() - num_arguments, stack->end());
  require_one_device(schema, arguments);
  tell_of_wait(schema, arguments);
  require_deterministic(schema, arguments);
  if (divides_by_number(schema, arguments)) {
    torch::jit::drop(*stack, num_arguments);
    stack->push_back(multiply_by_reciprocal(schema, arguments));
    return;
  }

  auto host_arguments = arguments;
  bool rounds = MATRIX_PRODUCTS.count(schema.name()) && at::globalContext().allowTF32CuBLAS();
  std::vector<std::pair<Tensor, Tensor>> written;  // on the host, on the device
  for (size_t i = 0; i < num_arguments; i++) {
    const auto* alias = schema.arguments()[i].alias_info();
    bool is_written = alias && alias->isWrite();
    auto view = [&](const Tensor& tensor) {
      // from_blob of no elements cannot be resized by the operator
      bool is_fresh = is_written && tensor.numel() == 0 && is_on_device(tensor);
      auto host = is_fresh ? at::empty(tensor.sizes(), tensor.options().device(c10::kCPU)) : view_on_host(tensor);
      if (is_written && is_on_device(tensor)) written.emplace_back(host, tensor);
      return rounds && !is_written ? round_to_tf32(host) : host;
    };
    host_arguments[i] = map_tensors(arguments[i], view);
    if (arguments[i].isDevice()) host_arguments[i] = c10::Device(c10::kCPU);
  }
  torch::jit::drop(*stack, num_arguments);
  for (auto& argument : host_arguments) stack->push_back(argument);
  handle.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  for (const auto& [host, target] : written) write_back(host, target);
  auto num_results = schema.returns().size();
  for (size_t i = stack->size() - num_results; i < stack->size(); i++) {
    (*stack)[i] = map_tensors((*stack)[i], [&](const Tensor& result) {
      for (const auto& [host, target] : written) {
        if (host.is_same(result)) return target;
      }
      return move_to_device(result);
    });
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", read_scalar);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("_thnn_fused_gru_cell", run_gru_cell);
  library.impl("_thnn_fused_gru_cell_backward", run_gru_cell_backward);
  library.impl("_thnn_fused_lstm_cell", run_lstm_cell);
  library.impl("_thnn_fused_lstm_cell_backward_impl", run_lstm_cell_backward);
  library.impl("as_strided", as_strided);
  library.impl("convolution_backward_overrideable", convolve_backward);
  library.impl("convolution_overrideable", convolve);
  library.impl("empty.memory_format", make_empty);
  library.impl("empty_strided", make_strided);
  library.impl("histc", count_in_bins);
  library.impl("resize_", resize_in_place);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_storage_view);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("unfold", unfold);
  library.impl("view", view);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

// torch.autocast, as far as the tests use it.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // the macros call it m
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv1d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("start", [](py::object listen) {
    static Hooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
    listener = new py::object(std::move(listen));
  });
}
