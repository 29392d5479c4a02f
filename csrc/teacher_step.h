// A teacher's step in progressive distillation; fastdiff/ops/teacher_step.py states the formula.
#pragma once

#include "tensor.h"

namespace fd {

struct TeacherStep {
  Size size;
  const float* table;  // [rows, 5]: px, pm, a, b, c
  int64_t rows;
  const int64_t* i;      // [samples]
  const float* weights;  // [samples], or null: w for all
  float w;
  Operand z, m, z_t, m_u, out;
};

struct TeacherRow {
  float w_1, px, pm, a, b, c;
};

FD_HOST_DEVICE TeacherRow teacher_row(const float* table, int64_t i, float w) {
  const float* k = table + 5 * i;
  return {w + 1.0f, k[0], k[1], k[2], k[3], k[4]};
}

template <bool guided, bool target>
FD_HOST_DEVICE float teacher_step_element(const TeacherRow& k, float z, float m, float m_u,
                                          float z_t) {
  if (guided) m = FD_FMA(k.w_1, m - m_u, m_u);
  const float D = FD_FMA(k.px, z, k.pm * m);
  const float next = FD_FMA(k.a, z, k.b * D);
  return target ? FD_FMA(k.c, z_t, next) : next;
}

}  // namespace fd
